"""The shop's desk and its questions, answered once more from the database itself."""

import json
from decimal import Decimal

import pytest

from jaxmethods.data import trajectories
from jaxmethods.data.trajectories import Desk, play

USERS = {
    "ann_lee_1": {
        "name": {"first_name": "Ann", "last_name": "Lee"}, "email": "ann@example.com", "orders": ["#W1", "#W2"],
        "address": {"city": "Bonn", "zip": "12345"},
    },
    "bob_ray_2": {
        "name": {"first_name": "Bob", "last_name": "Ray"}, "email": "bob@example.com", "orders": ["#W3"],
        "address": {"city": "Ulm", "zip": "54321"},
    },
}  # fmt: skip
ITEMS = {
    "#W1": [("Lamp", 3.5), ("Desk", 100.0)],
    "#W2": [("Mug", 4.25)],
    "#W3": [("Desk", 90.0), ("Pen", 1.5), ("Cup", 2.0)],
}
ORDERS = {
    name: {
        "user_id": "bob_ray_2" if name == "#W3" else "ann_lee_1",
        "status": "pending",
        "items": [{"name": item, "price": price} for item, price in items],
    }
    for name, items in ITEMS.items()
}


@pytest.fixture(scope="module")
def desk():
    return Desk({"users": USERS, "orders": ORDERS})


def test_lookups_and_errors(desk):
    for action, observed in (
        ("find_user_id_by_email[ann@example.com]", "ann_lee_1"),
        (" find_user_id_by_name_zip[Bob Ray 54321] ", "bob_ray_2"),
        ("get_user_details[ann_lee_1]", "name: Ann Lee; city: Bonn; zip: 12345; orders: #W1, #W2"),
        ("get_order_details[#W2]", "status: pending; user: ann_lee_1; items: Mug 4.25"),
        ("calculate[3.50 + 100 - 0.5]", "103.00"),
        ("finish[4]", ""),
        ("calculate[2 ** 9]", "Error: only sums and differences of numbers can be calculated"),
        ("get_order_details[#W9]", "Error: order not found"),
        ("find_user_id_by_email[x]", "Error: user not found"),
        ("cancel[#W1]", "Error: there is no action cancel"),
        ("I do not know", "Error: no action that can be read"),
        ("", "Error: no action that can be read"),
    ):
        assert desk(action) == observed


def by_hand(row, users, orders):
    """The answer, from the records."""
    kind, user = row["kind"], users[row["user"]]
    order = next((name for name in orders if name in row["question"]), None)
    items = lambda name: {item["name"]: Decimal(str(item["price"])) for item in orders[name]["items"]}
    if kind == "status":
        return orders[user["orders"][-1]]["status"]
    if kind == "dearest":
        return max(orders[user["orders"][0]]["items"], key=lambda item: item["price"])["name"]
    if kind == "city":
        return user["address"]["city"]
    if kind == "total":
        return f"{sum(Decimal(str(item['price'])) for item in orders[order]['items']):.2f}"
    if kind == "price":
        found = [
            price
            for name in user["orders"]
            for item, price in items(name).items()
            if f"the {item} cost" in row["question"]
        ]
        return f"{found[0]:.2f}"
    high, low = row["question"].partition("more does the ")[2].rstrip("?").split(" cost than the ")
    return f"{items(order)[high] - items(order)[low]:.2f}"


def test_every_answer_is_that_of_the_records(desk):
    made = trajectories.asked(desk)
    assert {row["kind"] for row, _ in made} == set(trajectories.KINDS)
    for row, solver in made:
        assert row["answer"] == by_hand(row, USERS, ORDERS), row
        steps = play(solver, desk)
        assert 2 <= len(steps) <= 6 and not any(s["observation"].startswith("Error") for s in steps)
        assert trajectories.states(steps, row["path"]) == [0] * len(steps)


def test_the_real_shop(tmp_path, monkeypatch):
    try:
        desk = trajectories.retail()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    made = trajectories.asked(desk, seed=3)
    assert len(made) > 2000
    for row, _ in made[::7]:
        assert row["answer"] == by_hand(row, desk.users, desk.orders), row
    monkeypatch.setattr("sys.argv", ["trajectories", "--to", str(tmp_path), "--gold", "30", "--questions", "24"])
    trajectories.main()
    gold, questions, perturbed = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("gold", "questions", "perturbed")
    )
    assert len(gold) == 30 and len(questions) == 24 and all(row["correct"] for row in gold)
    of = lambda rows: {row["id"].removesuffix("-wrong").partition("-")[2] for row in rows}
    assert not of(gold) & of(questions) and of(perturbed) <= of(questions)  # other users
    wrong = [row for row in perturbed if not row["correct"]]
    assert 12 < len(wrong) <= 24 and len(perturbed) == 24 + len(wrong)
    for row in wrong:
        assert trajectories.answered(row["steps"]) != row["answer"] and 1 in [step["state"] for step in row["steps"]]
        assert all(step["observation"] == desk(step["action"]) for step in row["steps"])


def test_how_far_off_the_path(desk):
    path = ["find_user_id_by_email[ann@example.com]", "get_user_details[ann_lee_1]", "finish[Bonn]"]
    step = lambda action: {"action": action, "observation": desk(action)}
    of = lambda *actions: trajectories.states([step(action) for action in actions], path)
    assert of(*path) == [0, 0, 0]
    assert of(path[0], "finish[Bonn]") == [0, 1]  # too early, though right
    assert of("get_user_details[bob_ray_2]", "fly[]", "", *path) == [1, 2, 2, 0, 0, 0]


def test_refused(desk):
    with pytest.raises(ValueError, match="gold=0 must be at least 1"):
        trajectories.make(desk, gold=0)
    with pytest.raises(ValueError, match="are more than the"):
        trajectories.make(desk, gold=1, questions=100)
