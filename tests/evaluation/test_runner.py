"""Whole runs over real HTTP: every protocol row, and what is sent, counted and kept."""
import json
from statistics import fmean

import pytest

from evaluation.__main__ import main
from evaluation.problems import EnvironmentFault
from evaluation.protocol import Server
from tests.evaluation.whole import KEY, attempts, opened, outcomes, run, summary
from tests.fixtures.servers import rows, running
from tests.fixtures.standins import Answer, completion, counter_player, endpoint, environment, failure

FORMS = sorted(name for name in rows() if name.startswith("form-"))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "in serve.py"])
def test_a_server_of_this_form_is_played_through(name, wrapped, tmp_path):
    with running(rows()[name], tmp_path, wrapped) as client, endpoint(counter_player) as model:
        before = opened(client)
        assert run(tmp_path / "out", client.base.removesuffix("/maze"), model.base_url, "--items", "0-9", env=name) == 0
        after = opened(client)
        work = json.loads((tmp_path / "out" / "run.json").read_text())["work"][0]
    assert outcomes(tmp_path / "out") == {str(n): "success" if n % 2 == 0 else "failure" for n in range(10)}
    for record in attempts(tmp_path / "out"):
        assert record["rounds"] == 3 and record["scaled"] == float(record["success"])
        assert record["reward"] == record["scaled"] * rows()[name].reward_range[1]
        assert [turn["action"] for turn in record["turns"]][:2] == ["add", "add"]
    sessions, closes = work["sessions"], wrapped or rows()[name].protocol.close
    assert sessions["lost"] == 0 and 0 < sessions["opened"] == sessions["closed" if closes else "pooled"]
    assert sessions["pooled" if closes else "closed"] == 0 and (tmp_path / "out" / "sessions.jsonl").read_bytes() == b""
    if rows()[name].protocol.close:
        assert after == before
    else:  # no more sessions than were played at once: they are used again
        assert after - before <= rows()[name].concurrency


def test_the_expert_solves_the_demo_and_a_random_player_does_not(tmp_path, capsys):
    from tasks.lib.environments.rows import environment as row_of
    with running(row_of("demo"), tmp_path) as client:
        for player in ("expert", "random"):
            assert main(["run", "--env", "demo", "--server", client.base, "--model", player, "--out", str(tmp_path / player),
                         "--samples", "1" if player == "expert" else "2"]) == 0
    expert, chance = summary(tmp_path / "expert"), summary(tmp_path / "random")
    assert expert["success"]["mean"] == expert["reward"]["mean"] == 1.0 and expert["attempts"] == 48
    assert chance["reward"]["high"] < 0.3 and chance["success"]["high"] < expert["success"]["low"]
    # Computed here from the records, item by item.
    per_item: dict[str, list[float]] = {}
    for record in attempts(tmp_path / "random"):
        per_item.setdefault(record["item"], []).append(record["reward"])
    assert chance["reward"]["mean"] == pytest.approx(fmean(fmean(group) for group in per_item.values()))
    assert {len(group) for group in per_item.values()} == {2}
    assert "success rate" in capsys.readouterr().out


def test_what_the_endpoint_is_sent(tmp_path):
    with environment() as env, endpoint(counter_player) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "2", "--seed", "7", "--temperature", "0.3",
                   "--max-tokens", "64", "--extra-body", '{"top_k": 5}') == 0
    headers, body = model.requests[-1]
    assert headers["authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"], body["max_tokens"], body["top_k"]) == ("stand-in", 0.3, 64, 5)
    assert not body.get("stream") and body["seed"] == attempts(tmp_path / "out")[0]["seed"]
    roles = [message["role"] for message in body["messages"]]
    assert roles == ["user", "assistant", "user", "assistant", "user", "assistant", "user"]
    assert [message["content"] for message in body["messages"][2:]] == ["count 2", "add", "count 3", "add", "count 4"]


@pytest.mark.parametrize("field,flag", [("model", "--model"), ("messages", "--prompt"), ("stream", "--stream"), ("n", "--samples"), ("seed", "--seed"),
                                        ("temperature", "--temperature"), ("top_p", "--top-p"), ("max_tokens", "--max-tokens")])
def test_an_extra_body_does_not_change_what_the_run_claims(field, flag, tmp_path, capsys):
    assert run(tmp_path / "out", "http://127.0.0.1:9", "http://127.0.0.1:9/v1", "--items", "0", "--env-wait", "0.1", "--extra-body", f'{{"{field}": 1}}') == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--extra-body has {field}," in error and flag in error and not (tmp_path / "out").exists()


def test_a_field_that_is_left_out_may_come_with_the_extra_body(tmp_path):
    with environment() as env, endpoint(counter_player) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", "--temperature", "none", "--max-tokens", "0",
                   "--extra-body", '{"temperature": "auto", "max_tokens": null}') == 0
    _, body = model.requests[0]
    assert body["temperature"] == "auto" and body["max_tokens"] is None


def test_no_file_and_no_output_has_the_key(tmp_path, capsys):
    def say(messages, body):
        return failure(400, f"Your key {KEY} sent something odd") if body["messages"][2]["content"] == "count 3" else counter_player(messages, body)

    with environment() as env, endpoint(say) as model:
        run(tmp_path / "out", env.url, model.base_url.replace("http://", "http://user:pass@"), "--items", "0-3", "--concurrency", "1")
    shown = "".join(capsys.readouterr())
    for text in (shown, *(path.read_text() for path in (tmp_path / "out").iterdir() if path.is_file())):
        assert KEY not in text and "user:pass" not in text
    assert "***" in attempts(tmp_path / "out")[3]["error"]


def test_no_file_and_no_output_has_the_servers_login(tmp_path, capsys):
    with environment() as env, endpoint(counter_player) as model:
        server = env.url.replace("http://", "http://joe:hunter2@")
        assert run(tmp_path / "out", server, model.base_url, "--items", "0-1") == 0
        assert json.loads((tmp_path / "out" / "run.json").read_text())["work"][0]["server"] == env.url.replace("http://", "http://***@")
    assert run(tmp_path / "away", "http://joe:hunter2@127.0.0.1:9", model.base_url, "--items", "0", "--env-wait", "0.1") == 2
    shown = "".join(capsys.readouterr())
    assert "no environment server at http://***@127.0.0.1:9" in shown
    for text in (shown, *(path.read_text() for path in tmp_path.glob("*/*") if path.is_file())):
        assert "joe" not in text and "hunter2" not in text


def test_a_lost_servers_login_is_not_in_a_record(tmp_path):
    import asyncio

    async def create():
        async with Server("http://joe:hunter2@127.0.0.1:9", rows()["form-textcraft"].protocol) as server:
            await server.create()

    with pytest.raises(EnvironmentFault, match=r"http://\*\*\*@127.0.0.1:9"):
        asyncio.run(create())


def test_a_reset_that_says_in_its_reply_that_it_failed_is_the_environments_fault():
    """webarena's: the observation that a GET gives then is the last item's."""
    import asyncio

    async def reset(fault):
        protocol = rows()["form-textcraft"].protocol.replaced(reset_fault=fault)
        async with Server(env.url, protocol) as server:
            return await server.reset(await server.create(), 3)

    with environment() as env:
        assert asyncio.run(reset({"sites": "Error"})).observation == asyncio.run(reset({})).observation
    reply = Answer({"observation": "TimeoutError", "sites": "Error", "object": "Error"})
    with environment(lambda path, number, body: reply if path == "/reset" else None) as env, \
            pytest.raises(EnvironmentFault, match=r"POST /reset: .*TimeoutError"):
        asyncio.run(reset({"sites": "Error"}))


def test_samples_differ_in_seed_and_are_told_apart(tmp_path):
    import itertools
    draws = itertools.count()

    def say(messages, body):
        return "win" if next(draws) % 3 == 0 else "lose"

    with environment() as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-4", "--samples", "3", "--seed", "1") == 0
    records = attempts(tmp_path / "out")
    assert len({(record["item"], record["sample"]) for record in records}) == 15 == len({record["seed"] for record in records})
    solved: dict[str, int] = {}
    for record in records:
        solved[record["item"]] = solved.get(record["item"], 0) + record["success"]
    found = summary(tmp_path / "out")
    assert found["pass_at"]["3"]["mean"] == pytest.approx(sum(count > 0 for count in solved.values()) / 5)
    # Pass@2 of 3 samples, by listing the pairs: a pair fails when both do.
    pairs = [1 - (3 - c) * (2 - c) / 6 if c < 2 else 1.0 for c in solved.values()]
    assert found["pass_at"]["2"]["mean"] == pytest.approx(fmean(pairs))


def test_rounds_end_an_episode_and_a_token_limit_does(tmp_path):
    with environment() as env, endpoint(lambda messages, body: "add") as model:
        assert run(tmp_path / "rounds", env.url, model.base_url, "--items", "1", "--max-round", "4") == 0
        assert run(tmp_path / "tokens", env.url, model.base_url, "--items", "1", "--token-limit", "20") == 0
        assert not env.sessions
    assert [(one["outcome"], one["rounds"], one["success"]) for one in attempts(tmp_path / "rounds")] == [("max_rounds", 4, False)]
    assert [(one["outcome"], one["rounds"]) for one in attempts(tmp_path / "tokens")] == [("token_limit", 2)]


@pytest.mark.parametrize("words, upstream", [
    (["late", "add", "add", "add"], 0.3),
    (["late", "jump", "add", "add"], 0.6),
    (["add", "late", "late", "add"], 0.6),
], ids=["then actions", "then an action that is none", "twice"])
def test_a_late_win_that_does_not_end_the_episode_counts_once(words, upstream, tmp_path):
    row = rows()["form-babyai"]
    with running(row, tmp_path) as client, endpoint(lambda messages, body: words[len(messages) // 2 - 1]) as model:
        assert run(tmp_path / "out", client.base, model.base_url, "--items", "3", "--max-round", "4", env=row.name) == 0
    record, = attempts(tmp_path / "out")
    assert (record["outcome"], record["success"], record["reward"], record["rounds"]) == ("success", True, 0.3, 4)
    # AgentGym's own client takes the last `score`, in which the same reward was added up.
    assert record["upstream_reward"] == pytest.approx(upstream)


@pytest.mark.parametrize("flags", [(), ("--token-limit", "24")], ids=["the context is full", "the tokens are used up"])
def test_an_item_that_was_won_is_a_success_however_it_ended(flags, tmp_path):
    def say(messages, body):
        if len(messages) > 6 and not flags:
            return failure(400, "maximum context length", "context_length_exceeded")
        return ["late", "add", "add", "add"][len(messages) // 2 - 1]

    row = rows()["form-babyai"]
    with running(row, tmp_path) as client, endpoint(say) as model:
        assert run(tmp_path / "out", client.base, model.base_url, "--items", "3", "--max-round", "4", *flags, env=row.name) == 0
    record, = attempts(tmp_path / "out")
    assert (record["outcome"], record["success"], record["reward"], record["rounds"]) == ("success", True, 0.3, 2)


def test_the_answer_that_overflowed_is_paid_for_too(tmp_path):
    with environment() as env, endpoint(lambda messages, body: completion("add", 95, 6)) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", "--context-length", "100") == 0
    record, = attempts(tmp_path / "out")
    assert record["outcome"] == "context_overflow" and (record["usage"]["prompt"], record["usage"]["completion"]) == (95, 6)


def test_half_a_character_is_replaced_wherever_it_comes_from(tmp_path, capsys):
    half = "\ud83d"

    def fault(path, number, body):
        if path == "/reset":
            return Answer({"error": half}) if number == 0 else Answer({"observation": f"count 2 {half}"})
        return Answer({"observation": f"count 2 {half}", "reward": 1.0, "done": True}) if path == "/step" else None

    def say(messages, body):
        return failure(503, half) if len(model.requests) == 1 else completion(f"win {half}", reasoning_content=half)

    with environment(fault) as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0") == 0
        record, = attempts(tmp_path / "out")
        # A record of an older version, which has it still.
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / "run.json").write_bytes((tmp_path / "out" / "run.json").read_bytes())
        (tmp_path / "old" / "attempts.jsonl").write_text(json.dumps({**record, "first": half, "outcome": "env_error", "started": half}) + "\n")
        assert main(["report", str(tmp_path / "old")]) == 0
        assert run(tmp_path / "old", env.url, model.base_url, "--items", "0") == 0
    turn, = record["turns"]
    assert (record["first"], turn["completion"], turn["reasoning"]) == ("count 2 \ufffd", "win \ufffd", "\ufffd")
    assert turn["observation"] == "count 2 \ufffd" and record["tries_before"][0]["error"].endswith("\ufffd")
    for name in ("out", "old"):
        assert attempts(tmp_path / name)[0]["outcome"] == "success"
        assert main(["conversations", str(tmp_path / name), "--out", str(tmp_path / "talks")]) == 0
