"""The guards of several nodes by a clock that is only counted: what arrives or is lost, and what follows from it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from launcher.inside.guard import ENDED, ENDING, SHORT, UP, Gang, seal, unseal

NAMES = ("a", "b", "c")
TICK = 0.2


class World:
    """Three nodes whose clocks are told, and a network between them."""

    def __init__(self, *, nodes: int = 3, ahead: tuple[float, ...] = (0.0, 0.0, 0.0), **settings: Any) -> None:
        self.now, self.loss, self.delay = 1000.0, 0.0, 0.0
        self.ahead = ahead  # of the true time, each node's wall clock
        self.cut: set[tuple[int, int]] = set()
        self.frozen: set[int] = set()
        self.closed: set[int] = set()
        self.said: list[str] = []
        self.chance = random.Random(35)  # noqa: S311 - chance, and the same each time
        peers = [{"node": name, "address": "10.0.0.1", "port": 1} for name in NAMES[:nodes]]
        guard = {"peers": peers, "beat": 2.0, "grace": 60.0, "hang_timeout": None, **settings}
        self.gangs = [
            Gang({"node": name, "machine_rank": rank, "guard": guard}, now=self.now, say=self._say(name))
            for rank, name in enumerate(NAMES[:nodes])
        ]
        self.waiting: dict[int, list[dict[str, Any]]] = {rank: [] for rank in range(nodes)}
        self.steps: dict[int, float] = {}  # who writes a line how often

    def _say(self, name: str) -> Any:
        return lambda text: self.said.append(f"{name}: {text.removeprefix('launcher: ')}")

    def pass_time(self, seconds: float) -> None:
        """Let everybody turn every fifth of a second."""
        end = self.now + seconds
        while self.now < end - TICK / 2:
            self.now = round(self.now + TICK, 6)
            for rank, gang in enumerate(self.gangs):
                if rank not in self.frozen:
                    self._turn(rank, gang)

    def _turn(self, rank: int, gang: Gang) -> None:
        if rank in self.closed:
            return
        gang.wake(self.now)
        every = self.steps.get(rank)
        if every and self.now % every < TICK:
            gang.progress(self.now)
        for message in self.waiting.pop(rank):
            gang.hear(message, now=self.now, wall=self.now + self.ahead[rank])
        self.waiting[rank] = []
        gang.judge(self.now)
        for target in gang.due(self.now):
            message = gang.message(target, now=self.now, wall=self.now + self.ahead[rank])
            if target in self.closed and (rank, target) not in self.cut:
                gang.refused(target)
            elif (rank, target) not in self.cut and self.chance.random() >= self.loss:
                self.waiting[target].append(message)

    def verdicts(self) -> list[str]:
        return [gang.verdict for gang in self.gangs]

    def isolate(self, rank: int) -> None:
        """Nothing comes of it, and nothing goes to it."""
        others = [other for other in range(len(self.gangs)) if other != rank]
        self.cut |= {(rank, other) for other in others} | {(other, rank) for other in others}

    def end(self, rank: int, *, code: int, **said: Any) -> None:
        """A node's part is over."""
        report = {"code": code, "stopped": False, "oom": False, "failures": [], "ended": self.now, **said}
        self.gangs[rank].ended(report, why=f"node {NAMES[rank]}: exit {code}")

    def others(self, rank: int) -> list[dict[str, Any]]:
        return self.gangs[rank].others(now=self.now, wall=self.now + self.ahead[rank])


def failure(**said: Any) -> dict[str, Any]:
    return {"rank": 1, "exit_code": 3, "signal": None, "time": 1000.0, "type": None, "message": "", **said}


class TestTheEndOfOne:
    def test_the_failing_of_one_is_everybodys_verdict_at_once(self) -> None:
        world = World()
        world.pass_time(10)
        world.gangs[1].ending("node b, rank 1: exit 3", failures=[failure()])
        world.pass_time(2 * TICK)
        assert world.verdicts() == ["node b, rank 1: exit 3"] * 3
        assert not any(gang.hanging for gang in world.gangs)

    def test_a_bad_end_that_was_not_announced_counts_as_much(self) -> None:
        world = World()
        world.pass_time(10)
        world.end(2, code=1)
        world.pass_time(2 * TICK)
        assert world.verdicts()[:2] == ["node c: exit 1"] * 2

    def test_it_reaches_also_who_hears_only_others(self) -> None:
        world = World()
        world.pass_time(10)
        world.cut = {(0, 2), (2, 0)}
        world.gangs[0].ending("node a, rank 0: exit 3", failures=[failure()])
        world.pass_time(3 * TICK)
        assert world.verdicts()[2] == "node a, rank 0: exit 3"

    def test_a_good_end_ends_nobody_and_is_not_missed_afterwards(self) -> None:
        world = World()
        world.pass_time(10)
        world.end(1, code=0)
        world.pass_time(2)
        world.closed = {1}
        world.pass_time(3600)
        assert world.verdicts() == ["", "", ""]
        assert world.others(0)[0]["code"] == 0

    def test_what_is_told_first_stands(self) -> None:
        world = World()
        world.gangs[0].ending("the first")
        world.gangs[0].ending("the second")
        world.pass_time(10)
        assert world.verdicts()[1:] == ["the first"] * 2

    def test_who_ends_waits_until_all_have_heard_it_and_ended(self) -> None:
        world = World()
        world.pass_time(10)
        world.end(0, code=1)
        assert not world.gangs[0].is_told(world.now)
        world.pass_time(1)
        assert not world.gangs[0].is_told(world.now)  # they know, and have not ended
        world.end(1, code=143, stopped=True)
        world.end(2, code=143, stopped=True)
        world.pass_time(1)
        assert all(gang.is_told(world.now) for gang in world.gangs)

    def test_who_ended_well_waits_only_until_it_is_known(self) -> None:
        world = World()
        world.pass_time(10)
        world.end(0, code=0)
        assert not world.gangs[0].is_told(world.now)
        world.pass_time(2 * TICK)
        assert world.gangs[0].is_told(world.now)

    def test_nobody_waits_for_the_silent_nor_for_the_gone(self) -> None:
        world = World()
        world.pass_time(10)
        world.isolate(1)
        world.pass_time(10)
        world.end(2, code=1)
        world.pass_time(TICK)
        world.closed = {2}
        world.end(0, code=1)
        world.pass_time(2)
        assert world.gangs[0].is_told(world.now)

    def test_who_ended_well_waits_for_the_silent_lest_they_miss_it(self) -> None:
        world = World()
        world.pass_time(10)
        world.frozen = {1}
        world.end(0, code=0)
        world.pass_time(20)
        assert not world.gangs[0].is_told(world.now)
        world.frozen = set()
        world.pass_time(1)
        assert world.gangs[0].is_told(world.now)

    def test_who_ended_well_does_not_wait_for_who_is_gone(self) -> None:
        world = World()
        world.pass_time(10)
        world.closed = {1}
        world.end(0, code=0)
        world.pass_time(7)
        assert world.gangs[0].is_told(world.now)

    def test_who_may_still_be_starting_is_waited_for_a_while_after_a_bad_end(self) -> None:
        world = World()
        world.frozen = {1, 2}
        world.pass_time(1)
        world.end(0, code=1)
        world.pass_time(5)
        assert not world.gangs[0].is_told(world.now)
        world.pass_time(5)
        assert world.gangs[0].is_told(world.now)

    def test_a_single_node_has_nobody_to_tell(self) -> None:
        world = World(nodes=1)
        world.end(0, code=1)
        assert world.gangs[0].is_told(world.now)
        assert (world.gangs[0].clock, world.others(0)) == (0.0, [])


class TestSilence:
    def test_three_missed_beats_are_called_out_and_end_nothing(self) -> None:
        world = World()
        world.pass_time(10)
        world.isolate(1)
        world.pass_time(30)
        assert "a: node b is silent on the training network" in world.said
        assert world.verdicts() == ["", "", ""]
        world.cut = set()
        world.pass_time(4)
        assert any(line.startswith("a: node b is heard again, after 3") for line in world.said)

    def test_after_the_grace_each_side_ends(self) -> None:
        world = World()
        world.pass_time(10)
        world.isolate(1)
        world.pass_time(63)
        assert world.verdicts()[0].startswith("node b: lost: silent for 6")
        assert world.verdicts()[2].startswith("node b: lost: silent for 6")
        assert ": lost: silent for 6" in world.verdicts()[1]

    def test_who_was_never_heard_is_not_lost_but_told_of(self) -> None:
        world = World()
        world.isolate(2)
        world.pass_time(3600)
        assert world.verdicts() == ["", "", ""]
        assert [line.split(":")[0] for line in world.said if "nothing was heard of c" in line] == ["a", "b"]
        assert sum("nothing was heard of a, b" in line for line in world.said) == 1
        assert [report["node"] for report in world.others(0)] == []

    def test_a_closed_port_is_an_agent_that_is_gone(self) -> None:
        world = World()
        world.pass_time(10)
        world.closed = {1}
        world.pass_time(8)
        assert (
            world.verdicts()[0] == world.verdicts()[2] == "node b: lost: its agent is gone, though the machine answers"
        )

    def test_a_port_that_is_not_open_yet_is_nothing(self) -> None:
        world = World()
        world.closed = {1}
        world.pass_time(60)
        assert world.verdicts() == ["", "", ""]

    def test_who_stood_still_itself_blames_nobody(self) -> None:
        world = World()
        world.pass_time(10)
        world.frozen = {0, 1, 2}
        world.pass_time(7200)
        world.frozen = set()
        world.pass_time(30)
        assert (world.verdicts(), world.said) == (["", "", ""], [])

    def test_a_refusal_of_nobody_is_nothing(self) -> None:
        World().gangs[0].refused(-1)

    @pytest.mark.parametrize("seed", range(5))
    def test_f35_ten_minutes_with_a_fifth_lost_is_no_loss(self, seed: int) -> None:
        world = World()
        world.chance.seed(seed)
        world.loss = 0.2
        world.pass_time(600)
        assert world.verdicts() == ["", "", ""]
        world.gangs[1].ending("node b, rank 1: exit 3", failures=[failure()])
        world.pass_time(2)
        assert world.verdicts() == ["node b, rank 1: exit 3"] * 3


class TestHang:
    def test_f23_when_nobody_writes_anything_everybody_ends_within_five_seconds(self) -> None:
        world = World(hang_timeout=300.0)
        world.steps = {0: 1.0}
        world.pass_time(100)
        world.steps = {}
        world.pass_time(298)
        assert world.verdicts() == ["", "", ""]
        world.pass_time(7)
        assert len(set(world.verdicts())) == 1
        assert world.verdicts()[0] == "no progress: no process of any node wrote anything for 300 s"
        assert all(gang.hanging for gang in world.gangs)
        assert any(gang.decided for gang in world.gangs)

    def test_f23_an_hour_in_which_one_node_writes_is_no_hang_also_when_a_fifth_is_lost(self) -> None:
        world = World(hang_timeout=30.0)
        world.loss, world.steps = 0.2, {1: 10.0}
        world.pass_time(3600)
        assert world.verdicts() == ["", "", ""]

    def test_f24_a_node_that_stands_still_is_seen_by_the_others_as_a_hang(self) -> None:
        world = World(hang_timeout=30.0)
        world.steps = {0: 1.0, 1: 1.0, 2: 1.0}
        world.pass_time(10)
        world.frozen, world.steps = {1}, {}
        world.pass_time(36)
        assert world.verdicts()[0].startswith("no progress:")
        assert world.verdicts()[2].startswith("no progress:")

    def test_it_is_off_unless_it_is_asked_for(self) -> None:
        world = World()
        world.pass_time(7200)
        assert world.verdicts() == ["", "", ""]

    def test_it_is_off_while_somebody_was_never_heard_who_might_be_writing(self) -> None:
        world = World(hang_timeout=30.0)
        world.isolate(2)
        world.pass_time(3600)
        assert world.verdicts() == ["", "", ""]

    def test_one_node_alone_has_it_too(self) -> None:
        world = World(nodes=1, hang_timeout=30.0)
        world.gangs[0].progress(world.now)
        world.pass_time(31)
        assert world.gangs[0].decided

    def test_to_its_first_line_a_run_has_five_minutes(self) -> None:
        world = World(hang_timeout=30.0)
        world.pass_time(298)
        assert world.verdicts() == ["", "", ""]
        world.pass_time(4)
        assert [verdict[:12] for verdict in world.verdicts()] == ["no progress:"] * 3

    def test_who_wants_to_wait_longer_for_the_first_line_may(self) -> None:
        world = World(hang_timeout=1000.0)
        world.pass_time(998)
        assert world.verdicts() == ["", "", ""]

    def test_the_first_line_of_one_counts_for_all(self) -> None:
        world = World(hang_timeout=30.0)
        world.pass_time(10)
        world.gangs[2].progress(world.now)
        world.pass_time(36)
        assert [verdict[:12] for verdict in world.verdicts()] == ["no progress:"] * 3

    def test_what_has_ended_does_not_hang(self) -> None:
        world = World(nodes=1, hang_timeout=30.0)
        world.end(0, code=0)
        world.pass_time(100)
        assert world.verdicts() == [""]


class TestReports:
    def test_times_of_others_are_told_by_our_own_clock(self) -> None:
        world = World(ahead=(0.0, 3600.0, -5.0))
        world.pass_time(10)
        world.end(1, code=3, failures=[failure(time=world.now + 3600.0)])
        world.pass_time(1)
        (told,) = [one for one in world.others(0) if one["node"] == "b"]
        assert told["failures"][0]["time"] == pytest.approx(world.now - 1, abs=2 * TICK)
        (told,) = [one for one in world.others(2) if one["node"] == "b"]
        assert told["failures"][0]["time"] == pytest.approx(world.now - 1 - 5, abs=2 * TICK)
        assert [gang.clock for gang in world.gangs] == [0.0, pytest.approx(3600, abs=TICK), pytest.approx(-5, abs=TICK)]

    def test_a_clock_that_is_set_meanwhile_is_not_believed_for_long(self) -> None:
        world = World()
        world.pass_time(60)
        world.ahead = (0.0, -60.0, 0.0)
        world.pass_time(60)
        assert world.gangs[1].clock == pytest.approx(-60, abs=TICK)

    def test_clocks_of_who_was_not_heard_are_unknown(self) -> None:
        assert World().gangs[1].clock is None

    def test_a_lost_node_is_reported_with_when_it_was_last_heard(self) -> None:
        world = World()
        world.pass_time(10)
        cut_at = world.now
        world.isolate(1)
        world.pass_time(63)
        (told,) = [one for one in world.others(0) if one["node"] == "b"]
        assert told["lost"].startswith("lost: silent for 6")
        assert told["time"] == pytest.approx(cut_at, abs=2.1)
        assert (told["code"], told["failures"]) == (1, [])

    def test_a_node_that_said_it_was_ending_and_no_more_is_taken_at_its_word(self) -> None:
        world = World()
        world.pass_time(10)
        world.gangs[1].ending("node b, rank 1: exit 3", failures=[failure()])
        world.pass_time(1)
        world.isolate(1)
        world.pass_time(20)
        (told,) = [one for one in world.others(0) if one["node"] == "b"]
        assert (told["lost"], [one["exit_code"] for one in told["failures"]]) == ("", [3])

    def test_what_is_sent_stays_short(self) -> None:
        world = World(nodes=2)
        world.pass_time(10)
        world.end(0, code=1, failures=[failure(message="ü" * 100_000)] * 100)
        data = seal(b"key", world.gangs[0].message(1, now=world.now, wall=world.now))
        assert len(data) < 16 * 1024
        message = unseal(b"key", data)
        assert message is not None
        assert {len(one["message"]) for one in message["report"]["failures"]} == {SHORT}


class TestWhatArrives:
    def test_a_datagram_comes_out_as_it_went_in(self) -> None:
        message = World().gangs[0].message(1, now=1.0, wall=2.0)
        assert unseal(b"key", seal(b"key", message)) == {**message, "echo": None}

    @pytest.mark.parametrize("data", [b"", b"{}", b"\0" * 100, seal(b"other", {"from": 1})])
    def test_what_is_not_signed_with_our_key_is_no_message(self, data: bytes) -> None:
        assert unseal(b"key", data) is None

    @pytest.mark.parametrize("place", [0, 31, 32, 60])
    def test_a_changed_byte_is_noticed(self, place: int) -> None:
        data = bytearray(seal(b"key", World().gangs[0].message(1, now=1.0, wall=2.0)))
        data[place] ^= 1
        assert unseal(b"key", bytes(data)) is None

    def test_what_is_repeated_or_meant_for_another_one_is_passed_over(self) -> None:
        world = World()
        one, two = (world.gangs[1].message(0, now=1.0, wall=1.0) for _ in range(2))
        ours = world.gangs[0]
        ours.hear(two, now=5.0, wall=5.0)
        ours.hear(one, now=9.0, wall=9.0)
        ours.hear(two, now=9.0, wall=9.0)
        ours.hear(world.gangs[1].message(2, now=9.0, wall=9.0), now=9.0, wall=9.0)
        ours.hear({**two, "from": 7}, now=9.0, wall=9.0)
        assert ours.peers[1].heard == 5.0

    def test_states_are_told_in_their_order(self) -> None:
        world = World()
        gang = world.gangs[0]
        states = [gang.message(1, now=0.0, wall=0.0)["state"]]
        gang.ending("why")
        states.append(gang.message(1, now=0.0, wall=0.0)["state"])
        world.end(0, code=1)
        states.append(gang.message(1, now=0.0, wall=0.0)["state"])
        assert states == [UP, ENDING, ENDED]
