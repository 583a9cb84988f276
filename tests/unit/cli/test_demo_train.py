"""The training program of the demo: what its comparisons rest on."""

import json
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from ckptsvc.cli.demonstration.facts import Run
from ckptsvc.cli.demonstration.train import (
    CONTEXT,
    GLOBAL_BATCH,
    Attention,
    ByteGPT,
    Share,
    Text,
    lay_out,
    main,
    state_digest,
)


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def test_a_batch_is_a_function_of_its_step() -> None:
    text, again = Text(), Text()
    assert text.batch(7).shape == (GLOBAL_BATCH, CONTEXT + 1)
    assert torch.equal(text.batch(7), again.batch(7))
    assert not torch.equal(text.batch(7), text.batch(8))
    assert b"import" in text.bytes.tobytes()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_ranks_share_a_batch_without_gap_or_overlap(ranks: int) -> None:
    batch = torch.arange(GLOBAL_BATCH * 2).reshape(GLOBAL_BATCH, 2)
    shares = [Share(rank, ranks).of(batch) for rank in range(ranks)]
    assert {len(share) for share in shares} == {GLOBAL_BATCH // ranks}
    assert torch.equal(torch.cat(shares), batch)


def test_a_slice_of_the_rows_of_qkv_is_a_set_of_heads() -> None:
    """Tensor parallelism cuts `qkv` by rows and `out` by columns, and adds the results."""
    torch.manual_seed(0)
    whole = Attention(32, 4)
    x = torch.randn(2, 5, 32)
    total = torch.zeros(2, 5, 32)
    for half in range(2):
        part = Attention(32, 4)
        part.qkv.weight = torch.nn.Parameter(whole.qkv.weight[half * 48 : (half + 1) * 48])
        part.out.weight = torch.nn.Parameter(whole.out.weight[:, half * 16 : (half + 1) * 16])
        total += part(x)
    torch.testing.assert_close(total, whole(x))


def test_no_position_sees_what_comes_after_it() -> None:
    torch.manual_seed(0)
    model = ByteGPT(32, 2, 4)
    tokens = torch.randint(0, 256, (1, CONTEXT))
    changed = tokens.clone()
    changed[0, -1] ^= 1
    assert torch.equal(model(tokens)[:, :-1], model(changed)[:, :-1])
    assert not torch.equal(model(tokens)[:, -1], model(changed)[:, -1])


def test_the_digest_sees_one_bit_of_weight_moment_and_rate() -> None:
    def make() -> tuple[ByteGPT, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = ByteGPT(32, 1, 4)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = make()
    digest = state_digest(model, optimizer)
    assert digest == state_digest(*make())
    weight = model.blocks[0].up.weight
    for value in (weight.data, optimizer.state[weight]["exp_avg_sq"]):
        before = value[3, 5].clone()
        value[3, 5] = before.nextafter(torch.tensor(1.0))
        assert state_digest(model, optimizer) != digest
        value[3, 5] = before
    optimizer.param_groups[0]["lr"] *= 0.5
    assert state_digest(model, optimizer) != digest


@pytest.mark.parametrize(("layout", "ranks"), [("none", 2), ("fsdp", 5), ("fsdp2x2tp", 2)])
def test_a_layout_that_does_not_fit_is_refused(layout: str, ranks: int) -> None:
    with pytest.raises(click.UsageError, match=str(ranks)):
        lay_out(ByteGPT(32, 1, 4), layout, 0, ranks)


def test_two_controls_are_equal_and_logged(tmp_path: Path) -> None:
    runs = []
    for name in "ab":
        log = tmp_path / f"{name}.jsonl"
        flags = ["--no-ckpt", "--log-file", str(log), "--steps", "4", "--stop-at", "3", "--digest-every", "3"]
        result = CliRunner().invoke(main, flags, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        lines = log.read_text().splitlines(keepends=True)
        assert [json.loads(line)["event"] for line in lines] == ["start", "step", "step", "step", "state", "end"]
        runs.append(Run.from_log(lines, "control", "one rank", "control"))
    assert list(runs[0].losses) == [1, 2, 3]
    assert runs[0].losses == runs[1].losses
    assert runs[0].losses[3] < runs[0].losses[1]
    assert runs[0].states == runs[1].states != {}


@pytest.mark.parametrize("flags", [[], ["--no-ckpt", "--store", "memory://x"]])
def test_either_a_store_or_none(tmp_path: Path, flags: list[str]) -> None:
    result = CliRunner().invoke(main, [*flags, "--log-file", str(tmp_path / "log.jsonl")])
    assert result.exit_code == 2
    assert "either --store or --no-ckpt" in result.output
