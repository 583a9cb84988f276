"""What a process says about itself."""

import importlib.util
import json
import sys
import threading
from typing import Any

import msgspec
import pytest

from ckptsvc.client import flight, witness
from ckptsvc.rpc.identity import MAX_PACKET
from ckptsvc.rpc.testimony import MAX_FRAMES, Answer, Group, frame_line


def entry(number: int, done: bool = True, **changes: Any) -> dict[str, Any]:
    """One collective, with the fields and values that torch 2.13 writes on Gloo."""
    return {
        "collective_seq_id": number, "input_dtypes": ["Float"], "input_sizes": [[1024]], "is_p2p": False,
        "op_id": number, "output_dtypes": ["Float"], "output_sizes": [[1024]], "p2p_seq_id": 0, "pg_id": 0,
        "process_group": ["0", "default_pg"], "profiling_name": "gloo:all_reduce", "record_id": number,
        "retired": done, "state": "scheduled", "thread_id": "1", "thread_name": "python",
        "time_created_ns": 1_000 + number, "time_discovered_completed_ns": 0, "time_discovered_started_ns": 0,
        "timeout_ms": 1_800_000,
    } | changes  # fmt: skip


def dump(*entries: dict[str, Any]) -> bytes:
    return json.dumps({"version": "2.10", "pg_config": {}, "pg_status": {}, "entries": entries}).encode()


def ask(what: str, number: int = 1) -> Answer:
    return msgspec.json.decode(witness.answer(json.dumps({"id": number, "what": what}).encode()), type=Answer)


class TestCollectives:
    def test_one_that_is_waited_in(self):
        (group,) = flight.progress([dump(entry(4), entry(5), entry(6, False))])
        assert group == Group("default (gloo)", 6, 5, "all_reduce of [1024] float32 in group default (gloo)")

    def test_all_completed(self):
        assert flight.progress([dump(entry(4), entry(5))]) == [Group("default (gloo)", 5, 5, "")]

    def test_several_in_flight_the_oldest_is_told(self):
        (group,) = flight.progress([dump(entry(5), entry(6, False), entry(7, False, profiling_name="gloo:barrier"))])
        assert (group.enqueued, group.completed) == (7, 5)
        assert group.collective.startswith("all_reduce")

    def test_nccl_says_completed_before_it_is_retired(self):
        nccl = {"profiling_name": "nccl:_all_gather_base", "input_dtypes": ["BFloat16"], "input_sizes": [[4], [5]]}
        entries = (entry(1, False, state="completed", **nccl), entry(2, False, state="started", **nccl))
        (group,) = flight.progress([dump(*entries)])
        assert group == Group("default (nccl)", 2, 1, "_all_gather_base of [4], [5] bfloat16 in group default (nccl)")

    def test_the_group_that_is_waited_in_comes_first_else_the_one_last_used(self):
        mesh = {"process_group": ["7", "mesh_tp"]}
        other = {"process_group": ["3", "undefined"]}
        found = flight.progress([dump(entry(1, False), entry(2, True, **mesh)), dump(entry(9, True, **other))])
        assert [group.name for group in found] == ["default (gloo)", "3 (gloo)", "mesh_tp 7 (gloo)"]

    def test_sends_and_receives_have_no_number(self):
        (group,) = flight.progress([dump(entry(1, False, is_p2p=True, profiling_name="gloo:recv 0<-1"))])
        assert group == Group("default (gloo)", -1, -1, "recv 0<-1 of [1024] float32 in group default (gloo)")

    def test_many_tensors_are_not_all_listed(self):
        (group,) = flight.progress([dump(entry(1, False, input_sizes=[[n] for n in range(100)]))])
        assert group.collective == "all_reduce of [0], [1], [2], [3] and 96 more float32 in group default (gloo)"

    def test_a_dump_of_another_shape_is_an_error(self):
        for text in (b"", b"[]", b'{"entries": [1]}', b'{"entries": [{"process_group": "0"}]}', b"\xff"):
            with pytest.raises((msgspec.MsgspecError, UnicodeDecodeError)):
                flight.progress([text])

    def test_what_this_torch_records_is_understood(self):
        """The fault tests read a recording with something in it."""
        import torch.distributed  # noqa: F401

        assert ask("collectives").note in ("", "torch's flight recorder has recorded nothing in this process")

    def test_without_torch_nothing_is_imported(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "torch")
        assert list(flight.recorded()) == []
        assert "torch" not in sys.modules

    def test_a_recorder_that_fails_is_told(self, monkeypatch):
        def fail() -> list[Group]:
            raise RuntimeError("\ud800 broken")

        monkeypatch.setattr(flight, "recorded", fail)
        assert "RuntimeError" in ask("collectives").note


class TestStacks:
    def test_every_thread_is_told_of_the_main_one_first(self):
        go = threading.Event()
        thread = threading.Thread(target=go.wait, name="reader")
        thread.start()
        stacks = ask("stacks").stacks  # by the main thread itself, which leaves itself out
        go.set()
        thread.join()
        (reader,) = [stack for stack in stacks if stack.thread == "reader"]
        assert not reader.main
        assert reader.frames[-2].startswith("Event.wait (threading.py:")

    def test_of_endless_stacks_the_packet_has_the_innermost_frames(self, monkeypatch):
        go = threading.Event()

        def deep(left: int) -> None:
            if left:
                deep(left - 1)
            else:
                go.wait(20.0)

        threads = [threading.Thread(target=deep, args=(200,), name="n" * 500) for _ in range(50)]
        for thread in threads:
            thread.start()
        packet = witness.answer(b'{"id": 1, "what": "stacks"}')
        go.set()
        for thread in threads:
            thread.join()
        assert len(packet) <= MAX_PACKET
        stacks = msgspec.json.decode(packet, type=Answer).stacks
        assert stacks
        deepest = [stack.frames for stack in stacks if stack.thread.startswith("n")]
        assert all(len(frames) == MAX_FRAMES + 1 and frames[0].startswith("...") for frames in deepest)

    def test_names_that_utf8_cannot_say(self):
        spec = importlib.util.spec_from_loader("odd", loader=None)
        assert spec is not None
        code = compile("result = ask()", "/data/\udcff.py", "exec")
        space: dict[str, Any] = {}
        done = threading.Event()
        go = threading.Event()
        space["ask"] = lambda: (done.set(), go.wait(20.0))
        thread = threading.Thread(target=exec, args=(code, space))
        thread.start()
        done.wait(20.0)
        stacks = ask("stacks").stacks
        go.set()
        thread.join()
        assert any(line == "<module> (/data/?.py:1)" for stack in stacks for line in stack.frames)


def test_a_question_that_is_none_gets_an_answer_that_says_so():
    for packet in (b"", b"[]", b'{"id": 1, "what": "environment"}', b"\xff", b"[" * 60_000):
        testimony = msgspec.json.decode(witness.answer(packet), type=Answer)
        assert testimony.note
        assert not testimony.stacks


@pytest.mark.parametrize(
    ("filename", "line"),
    [
        ("/v/lib/python3.11/site-packages/torch/nn/modules/module.py", "f (torch/nn/modules/module.py:3)"),
        ("/usr/lib/python3/dist-packages/numpy/core.py", "f (numpy/core.py:3)"),
        ("/usr/lib/python3.12/threading.py", "f (threading.py:3)"),
        ("/home/ada/train.py", "f (/home/ada/train.py:3)"),
        ("<string>", "f (<string>:3)"),
    ],
)
def test_a_frame_reads_the_same_on_every_machine(filename, line):
    assert frame_line(filename, 3, "f") == line
