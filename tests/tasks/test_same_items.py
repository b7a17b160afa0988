"""`env.check --items` and `--all`: whether an item is the same task every time."""
import pytest

from servers.protocol import ServerError
from tasks.lib.environments.rows import environment
from tasks.lib.environments.same_items import SameItems, all_items, chosen_items, script_of
from tasks.lib.errors import UserError
from tests.fixtures.servers import rows, running


def played(client, row, items, replicas=1):
    same = SameItems(row, script_of(row))
    same.play(client, items, replicas, lambda line: None)
    return same


@pytest.mark.parametrize("name", ["form-textcraft", "form-sqlgym", "form-webshop"])
def test_items_that_are_the_same_every_time_are(name, tmp_path):
    row = rows()[name]
    with running(row, tmp_path) as client:
        same = played(client, row, range(10))
        assert (same.differing, same.failing, same.played) == ({}, {}, 40)
        assert same.expected[3][0] == "count 3" and same.expected[3][1].startswith("count 4\n0.0 False")
        assert client.sessions()["live"] == 0


def test_an_item_that_differs_is_named_with_the_place_where_it_does(tmp_path):
    row = rows()["form-textcraft"]
    with running(row, tmp_path, FAULT="unsteady") as client:
        same = played(client, row, [2, 5])
    assert sorted(same.differing) == [2, 5] and same.differing[2].startswith("the first observation: …'count 2.")


class Later:
    """A server whose item 1 differs from the second step of the second session on, and whose item 2 cannot be reset."""

    def __init__(self):
        self.sessions, self.steps, self.item = 0, 0, 0

    def create(self):
        self.sessions += 1
        return self.sessions

    def reset(self, session, item):
        self.item, self.steps = item, 0
        if item == 2:
            raise ServerError("POST /reset: no such item", 200)
        return "begin"

    def step(self, session, action):
        from servers.protocol import Step
        self.steps += 1
        late = self.item == 1 and session == 2 and self.steps == 2
        return Step("there is a mop" if late else "there is a jug", 0.0, False)

    def close(self, session):
        return True


def test_what_differs_later_and_what_fails_is_told_apart():
    same = played(Later(), rows()["form-textcraft"], [0, 1, 2])
    assert list(same.differing) == [1] and list(same.failing) == [2]
    assert same.differing[1] == "step 2: …'there is a jug 0.0 False', then …'there is a mop 0.0 False'"
    assert same.failing[2] == "POST /reset: no such item"


def test_every_replica_is_played_or_it_is_told():
    with pytest.raises(ServerError, match="no session on 1 of 3 replicas"):
        client = Later()
        client.create = iter([0, 1] * 100).__next__
        played(client, rows()["form-textcraft"], [0], replicas=3)


def test_all_items_are_reset_once(tmp_path):
    row = rows()["form-textcraft"]
    with running(row, tmp_path) as client:
        same = SameItems(row, [])
        same.reset_all(client, all_items(row), lambda line: None)
    assert same.played == 10 and not same.failing and same.expected[9] == ("count 9", )


@pytest.mark.parametrize("asked,items", [("0-3", [0, 1, 2, 3]), ("7", [7]), ("5, 1-2,5", [5, 1, 2])])
def test_items_are_numbers_and_ranges(asked, items):
    assert chosen_items(rows()["form-textcraft"], asked) == items


@pytest.mark.parametrize("asked", ["", "x", "3-1", "1-", "-1", "0-9,", "1e3", "0-99999999999999999999", "\u0663"])
def test_what_is_no_list_of_items_is_told(asked):
    with pytest.raises(UserError, match="no list of items; give numbers and ranges such as 0-50,100"):
        chosen_items(rows()["form-textcraft"], asked)


def test_an_item_that_the_row_has_not_is_told():
    with pytest.raises(UserError, match="form-textcraft has the items 0 to 9"):
        chosen_items(rows()["form-textcraft"], "5-10")
    with pytest.raises(UserError, match="have no end; give some with --items"):
        all_items(environment("babyai"))


def test_the_rows_last_items_are_those_that_can_be_played():
    assert environment("maze").items.last == 24  # 25 starts on its goal


def test_sciworlds_javas_have_constant_identity_hashes():
    assert "-XX:hashCode=2" in environment("sciworld").env["JAVA_TOOL_OPTIONS"]
