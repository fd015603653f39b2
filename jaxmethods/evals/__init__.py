"""Evaluators: functions from a module with parameters to numbers, compiled where it counts."""
