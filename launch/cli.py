"""The command line: `jaxmethods train | cream | rag | generate | evaluate | embed | curate | export | plan`.

Exit status: 0; 1 for a run that failed; 2 and one line for a wrong config, file or flag.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

COMMANDS: dict[str, str] = {
    "train": "train CONFIG.py [--FIELD VALUE ...] [--distributed]: run a recipe; the same command again resumes",
    "plan": "plan CONFIG.py [--topology v5p:8x8x8|h100:8 [--search]] [--json] [--picture FILE.png] [--FIELD VALUE ...]: "
    "what the run is, before it runs",
    "cream": "cream CONFIG.py [--FIELD VALUE ...]: self-rewarding rounds from M1 on; the same command again goes on",
    "rag": "rag CONFIG.py [--FIELD VALUE ...]: retrieved reports, the preference pairs that they make, and training on these",
    "generate": "generate DIR|MODEL --prompt TEXT: answer a prompt with a run's model or any other",
    "evaluate": "evaluate NAME DIR|MODEL: measure a model; `evaluate --help` lists the names",
    "embed": "embed DIR|MODEL --data ROWS --to FILE.parquet: embed pictures and texts",
    "curate": "curate mmedpo DIR|MODEL --data ROWS --to PAIRS.jsonl: preference pairs of rows with known answers",
    "export": "export DIR --to OUT [--format hf|peft|adapter]: write a run's model for others",
}

EVALUATIONS: dict[str, tuple[str, str]] = {
    "completion": (
        "evaluate:Evaluate:evaluate",
        "likelihood of known answers, and how far greedy ones agree with them",
    ),
    "retrieval": ("evaluate:Evaluate:evaluate", "which pictures and texts find each other by their embeddings"),
    "score": ("score:Score:score", "log-likelihoods of answers or choices, a row of a Parquet file each"),
    "harness": ("harness:Harness:harness", "tasks of lm-evaluation-harness"),
    "scylla": ("scylla:Scylla:evaluate_scylla", "generalization over tasks of graded complexity: the valley"),
    "facttest": ("facttest:FactTest:evaluate_facttest", "when to answer: certified thresholds on uncertainty"),
    "saup": ("saup:Saup:saup", "uncertainty of an agent's steps, propagated to its answer"),
}
"""Name -> (module:options:function in launch/, what it measures)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(__doc__.split("\n\n")[0] + "\n\n" + "\n".join(f"  {text}" for text in COMMANDS.values()))
        print("\n`jaxmethods COMMAND --help` explains a command's options.")
        sys.exit(0)
    name, *rest = arguments
    if name == "--version":
        from jaxmethods import __version__

        print(__version__)
        sys.exit(0)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        _fail(f"unknown command {name!r}; {hint}Commands: {', '.join(COMMANDS)}.", 2)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing is as it should be
    try:
        _command(name)(rest)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except KeyboardInterrupt:
        _fail("interrupted; what was saved before is kept.", 130)
    except (ValueError, FileNotFoundError, ConnectionError, ImportError) as error:
        if os.environ.get("JAXMETHODS_TRACEBACK"):
            raise
        _fail(" ".join(str(error).split()), 2)
    except RuntimeError as error:
        from jaxmethods.launch.distributed import OthersFailed
        from jaxmethods.launch.train import RunFailed

        told = isinstance(error, RunFailed | OthersFailed) or "RESOURCE_EXHAUSTED" in str(error)
        if os.environ.get("JAXMETHODS_TRACEBACK") or not told:
            raise
        _fail(" ".join(str(error).split())[:600], 1)


def _fail(text: str, status: int) -> None:
    joined = sys.modules.get("jaxmethods.launch.distributed")
    print(f"jaxmethods{joined.label() if joined else ''}: {text}", file=sys.stderr)
    sys.exit(status)


def _command(name: str) -> Callable[[list[str]], None]:
    return {
        "train": _train,
        "plan": _plan,
        "cream": _cream,
        "rag": _rag,
        "generate": _generate,
        "evaluate": _evaluate,
        "embed": _embed,
        "curate": _curate,
        "export": _export,
    }[name]


def _run_of(command: str, arguments: list[str]) -> Any:
    """The Run of `CONFIG.py [overrides]`."""
    from jaxmethods.launch.config import Run

    return _config_of(command, arguments, Run, _take_short_names)


def _config_of(command: str, arguments: list[str], kind: Any, take: Callable[..., Any] = lambda *given: given) -> Any:
    """The config of `CONFIG.py [overrides]`; `take(arguments, config)` handles what are no fields first."""
    import tyro

    from jaxmethods.launch import config

    positional = [a for a in arguments[:1] if not a.startswith("-")]
    if not positional:
        if {"-h", "--help"} & set(arguments):
            print(
                f"usage: jaxmethods {COMMANDS[command]}\n\nGive a config before --help to see its fields with their values."
            )
            sys.exit(0)
        raise ValueError(f"{command} needs a config: jaxmethods {command} CONFIG.py")
    rest, run = take(arguments[1:], config.load_config(positional[0], kind))
    return tyro.cli(
        tyro.conf.AvoidSubcommands[kind],  # type: ignore[misc]
        prog=f"jaxmethods {command} {positional[0]}",
        default=run,
        args=rest,
        config=(tyro.conf.FlagConversionOff,),
    )


def _take(arguments: list[str], flag: str, like: str) -> tuple[list[str], str | None]:
    """Takes `flag VALUE` or `flag=VALUE` out of the arguments; the last one counts."""
    rest, value = [], None
    left = iter(arguments)
    for argument in left:
        name, equals, given = argument.partition("=")
        if name != flag:
            rest.append(argument)
            continue
        value = given if equals else next(left, "--")
        if not value or value.startswith("--"):
            raise ValueError(f"{flag} needs a value: {flag} {like}")
    return rest, value


def _take_short_names(arguments: list[str], run: Any) -> tuple[list[str], Any]:
    """Takes what has a name shorter than its field's out of the arguments.

    `--data PATH` (training rows), `--evaluation PATH` (held-out rows) and `--mesh data=1,fsdp=8` (axes not named keep what
    the config says).
    """
    import dataclasses

    for flag, field in (("--data", "train"), ("--evaluation", "evaluation")):
        arguments, path = _take(arguments, flag, "ROWS.jsonl")
        if path is not None:
            run = dataclasses.replace(run, data=dataclasses.replace(run.data, **{field: path}))
    arguments, mesh = _take(arguments, "--mesh", "data=1,fsdp=8")
    if mesh is not None:
        axes = [field.name for field in dataclasses.fields(run.mesh)]
        sizes = dict(part.partition("=")[::2] for part in mesh.split(","))
        for axis, size in sizes.items():
            if axis not in axes or not size.removeprefix("-").isdigit():
                raise ValueError(
                    f"--mesh: '{axis}={size}' is not AXIS=SIZE; the axes are {', '.join(axes)}, as in --mesh data=1,fsdp=8."
                )
        run = dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, **{a: int(n) for a, n in sizes.items()}))
    return arguments, run


def _train(arguments: list[str]) -> None:
    from jaxmethods.launch import distributed

    arguments, processes = _take_processes(arguments)
    if processes is not None:
        distributed.join(processes)  # before a recipe can touch a device

    from jaxmethods.launch.train import train

    train(_run_of("train", arguments))


def _cream(arguments: list[str]) -> None:
    from jaxmethods.launch.cream import SelfRewarding, run_rounds

    run_rounds(_config_of("cream", arguments, SelfRewarding))


def _rag(arguments: list[str]) -> None:
    from jaxmethods.launch.rag import RetrievalAugmented, run_rag

    run_rag(_config_of("rag", arguments, RetrievalAugmented))


def _take_processes(arguments: list[str]) -> tuple[list[str], Any]:
    """Takes `--distributed`, or `--coordinator HOST:PORT --processes N --process I`, out of the arguments.

    They are no fields of the run, which may go on with another number of processes.
    """
    from jaxmethods.launch.distributed import Processes

    rest = [argument for argument in arguments if argument != "--distributed"]
    detect = rest != arguments
    rest, coordinator = _take(rest, "--coordinator", "HOST:PORT")
    rest, count = _take(rest, "--processes", "N")
    rest, index = _take(rest, "--process", "I")
    for flag, value in (("--processes", count), ("--process", index)):
        if value is not None and not value.removeprefix("-").isdecimal():
            raise ValueError(f"{flag} {value} is no whole number.")
    told = Processes(coordinator, *(None if value is None else int(value) for value in (count, index)))
    if detect and told != Processes():
        raise ValueError(
            "--distributed asks the cluster for what --coordinator, --processes and --process say; give one or the other."
        )
    return rest, told if detect or told != Processes() else None


def _plan(arguments: list[str]) -> None:
    from jaxmethods.launch.plan import draw, plan, search, show, show_search

    flags = ("--json", "--search")
    rest, topology = _take([a for a in arguments if a not in flags], "--topology", "v5p:8x8x8")
    rest, picture = _take(rest, "--picture", "memory.png")
    run, as_json = _run_of("plan", rest), "--json" in arguments
    found: Any
    present: Callable[..., None]
    if "--search" not in arguments:
        found, present = plan(run, topology), show
    elif topology is None:
        raise ValueError("--search needs a target: --topology v5p:8x8x8")
    else:
        found, present = search(run, topology), show_search
    if picture:
        draw(found, picture, title=f"{rest[0]} on {topology or 'this machine'}")
    present(found, as_json=as_json)


def _generate(arguments: list[str]) -> None:
    import tyro

    from jaxmethods.launch.generate import Generate, generate

    generate(tyro.cli(Generate, prog="jaxmethods generate", args=arguments))


def _evaluate(arguments: list[str]) -> None:
    import importlib

    import tyro

    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        width = max(map(len, EVALUATIONS))
        told = "\n".join(f"  {name:{width}}  {what}" for name, (_, what) in EVALUATIONS.items())
        print(
            f"usage: jaxmethods {COMMANDS['evaluate']}\n\n{told}\n\n`jaxmethods evaluate NAME --help` explains its options."
        )
        return
    if name not in EVALUATIONS:
        near = difflib.get_close_matches(name, EVALUATIONS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"evaluate {name}: there is no such evaluation; {hint}They are {', '.join(EVALUATIONS)}.")
    module, options, function = EVALUATIONS[name][0].split(":")
    room = importlib.import_module(f"jaxmethods.launch.{module}")
    given, program = (
        (arguments, "jaxmethods evaluate") if module == "evaluate" else (rest, f"jaxmethods evaluate {name}")
    )
    getattr(room, function)(tyro.cli(getattr(room, options), prog=program, args=given))


def _embed(arguments: list[str]) -> None:
    import tyro

    from jaxmethods.launch.embed import Embed, embed

    embed(tyro.cli(Embed, prog="jaxmethods embed", args=arguments))


def _curate(arguments: list[str]) -> None:
    import tyro

    from jaxmethods.launch.curate import Curate, curate

    curate(tyro.cli(Curate, prog="jaxmethods curate", args=arguments))


def _export(arguments: list[str]) -> None:
    import tyro

    from jaxmethods.launch.export import Export, export

    export(tyro.cli(Export, prog="jaxmethods export", args=arguments))


if __name__ == "__main__":
    main()
