"""`ckptsvc layout`: the table of rules, and what is wrong with a layout."""

import json
from pathlib import Path

import pytest

from ckptsvc.cli.main import main

TO = ["--to", "dp=4,tp=8,pp=4,zero=1"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["layout", *arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict]:
    status, out, _ = run(capsys, *arguments, "--json")
    return status, json.loads(out)


def test_which_rule_took_each_tensor_and_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "declared:llama3-70b", *TO, "--explain")
    assert status == 0
    assert "128 ranks; Llama, Mistral, Qwen2, Qwen3: its rules take 723 of 723 parameters" in out
    row = next(line for line in out.splitlines() if "self_attn.o_proj.weight" in line)
    assert row.split("  ")[0] == "model.layers.0.self_attn.o_proj.weight"
    assert "x 80" in row
    assert "dim 1 / 8" in row
    assert "0-3" in row
    assert "60-79" in out.splitlines()[-1]


def test_the_same_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = as_json(capsys, "declared:llama3-70b", *TO)
    assert status == 0
    assert (found["world_size"], found["family"], found["sure"]) == (128, "llama", 1.0)
    assert found["variables"]["kv_heads"] == 8
    row = next(row for row in found["rows"] if row["name"].endswith("layers.0.self_attn.k_proj.weight"))
    assert (row["alike"], row["shape"], row["cut"], row["stages"]) == (80, [1024, 8192], "dim 0 / 8", [0, 1, 2, 3])
    # bf16 of 1/8, and an 1/32 of three fp32 tensors, and a step
    assert row["bytes_a_rank"] == 1024 * 8192 // 8 * 2 + 3 * 1024 * 8192 // 32 * 4 + 4
    assert [stage["layers"] for stage in found["stages"]] == [[[0, 19]], [[20, 39]], [[40, 59]], [[60, 79]]]
    assert found["problems"] == []


def test_every_layer_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    _, found = as_json(capsys, "declared:llama3-8b", "--to", "tp=2", "--explain", "--all")
    assert len(found["rows"]) == 291
    assert {row["alike"] for row in found["rows"]} == {1}


def test_what_does_not_divide_is_named_with_rule_and_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "declared:llama3-8b", "--to", "tp=3")
    assert status == 14
    assert "14336 cannot be divided over tp=3, as rule 5" in out
    assert "uneven=1" in out
    status, found = as_json(capsys, "declared:llama3-405b", "--to", "pp=64")
    assert status == 14
    assert "126 layers do not divide over pp 64" in found["problems"][0]["what"]
    assert as_json(capsys, "declared:llama3-405b", "--to", "pp=64,stages=balanced")[0] == 0


def test_rules_of_ones_own_and_tensors_nobody_claims(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rules = tmp_path / "mine.toml"
    rules.write_text(
        '[[rule]]\nname = "model.layers.{layer}.{rest:*}"\n[[rule]]\nname = "model.norm.{k}"\nstage = "last"\n'
        '[[rule]]\nname = "{x}.norm.weight"\nstage = "all"\n'
    )
    status, found = as_json(capsys, "declared:llama3-8b", "--to", "dp=2", "--rules", str(rules))
    assert status == 14
    assert (found["family"], found["sure"]) == ("mine", None)
    problems = {row["name"]: row["problem"] for row in found["rows"] if row["problem"]}
    assert problems == {
        "lm_head.weight": "no rule takes it",
        "model.embed_tokens.weight": "no rule takes it",
        "model.norm.weight": "rule 2 (model.norm.{k}) and rule 3 ({x}.norm.weight)",
    }


def test_a_variable_may_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    _, found = as_json(capsys, "declared:llama3-8b", "--to", "tp=8", "--variable", "kv_heads=4")
    assert found["variables"]["kv_heads"] == 4


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["declared:nobody", *TO], 2, "no model of known shape"),
        (["declared:llama3-8b", "--to", "dp"], 2, "no part of a layout"),
        (["declared:llama3-8b", "--to", "dp=0"], 14, "at least 1"),
        (["declared:llama3-8b", *TO, "--family", "nobody"], 2, "no family"),
        (["declared:llama3-8b", *TO, "--family", "llama", "--rules", "x"], 2, "exclude"),
        (["declared:llama3-8b", *TO, "--rules", "/nowhere/x.toml"], 10, "cannot be read"),
        (["declared:llama3-8b", *TO, "--variable", "heads=x"], 2, "NAME=NUMBER"),
    ],
)
def test_bad_input_is_one_sentence_and_a_status(
    capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, said: str
) -> None:
    got, _, err = run(capsys, *arguments)
    assert got == status
    assert said in err
