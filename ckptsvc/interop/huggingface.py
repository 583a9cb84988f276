"""Hugging Face checkpoints: `*.safetensors` (or `pytorch_model*.bin`), sharded or not, with their `config.json`.

Names are those of the model's `state_dict`; there is no optimizer state. Source: transformers 5.23, `modeling_utils.py`
(`save_pretrained`) and `utils/hub.py` (names of files).

Read options: none. Write options:
    dtype         element type of floating-point tensors in the files ("float32", "bfloat16", ...); default: as they are
    shard-size    largest file, as "5GB"; default 5GB
    config        path of the config.json to put beside the weights; default: that of the source, if it has one
    weights       "master" writes the fp32 masters in the place of the model's own tensors; default "model"
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptsvc.errors import Damaged, InvalidInput, LayoutError
from ckptsvc.format.document import join, split
from ckptsvc.geometry.box import Box
from ckptsvc.interop.files import Files
from ckptsvc.interop.logical import MASTER, MODEL, STATE, Foreign, Logical, Note
from ckptsvc.interop.options import choice, known
from ckptsvc.interop.outputs import Output, Small
from ckptsvc.interop.safetensors import DTYPE_OF_TAG, Tensor, read_safetensors, safetensors_output
from ckptsvc.interop.torch_format.file import StoredTensor, read_torch
from ckptsvc.quantities import parse_size
from ckptsvc.types import DTYPES, TensorMeta

CONFIG = "config.json"
SINGLE, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
SIDE_FILES = ("generation_config.json",)

_INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight")


def detect(files: Files) -> bool:
    """Weights under the names that transformers gives them."""
    names = set(files.children())
    return bool(names & {SINGLE, PICKLED, SINGLE + INDEX, PICKLED + INDEX})


def read(files: Files, origin: str, options: Mapping[str, str]) -> Foreign:
    """A directory that `save_pretrained` wrote.

    Raises:
        InvalidInput: there are no weights in it.
        Damaged: a file is broken or missing, or the index contradicts the files.
    """
    known(options, ())
    foreign = Foreign(origin, files)
    names = set(files.children())
    main = next((name for name in (SINGLE + INDEX, SINGLE, PICKLED + INDEX, PICKLED) if name in names), None)
    if main is None:
        raise InvalidInput(f"{files.url} has neither {SINGLE} nor {PICKLED} nor an index of them")
    if main.endswith(INDEX):
        weight_map = _weight_map(files, main)
        for key in sorted(set(weight_map.values())):
            _add_file(foreign, files, key, {name for name, file in weight_map.items() if file == key})
    else:
        _add_file(foreign, files, main, None)
    config = _config(files) if CONFIG in names else {}
    foreign.plain = {"huggingface": {"config": config, **_side_files(files, names)}}
    _tie(foreign, config)
    if {"optimizer.pt", "optimizer.bin"} & names:
        foreign.notes.append(
            Note("lost", "the optimizer state of the trainer beside the weights is not read: use torch:")
        )
    return foreign.seal()


def write(logical: Logical, options: Mapping[str, str]) -> Output:
    """Files for `from_pretrained`.

    Raises:
        InvalidInput: an option is wrong.
        LayoutError: there are no tensors of a model.
    """
    known(options, ("dtype", "shard-size", "config", "weights"))
    dtype = options.get("dtype", "")
    if dtype and dtype not in DTYPES:
        raise InvalidInput(f"{dtype!r} is no element type", hint="write float32, bfloat16 or float16")
    limit = parse_size(options.get("shard-size", "5GB"))
    masters = choice(options, "weights", ("model", "master")) == "master"
    tensors, notes = _weights(logical, dtype, masters=masters)
    groups = _groups(tensors, limit)
    shards = [_shard_name(i, len(groups)) for i in range(len(groups))]
    files = [safetensors_output(key, group, {"format": "pt"}) for key, group in zip(shards, groups, strict=True)]
    small = [*_configs(logical, options, dtype, notes)]
    if len(groups) > 1:
        small.append(_index(shards, groups))
    return Output(files, lambda _: small, notes, {"format": "huggingface", **options})


# ---- reading ------------------------------------------------------------------------------------------------


def _add_file(foreign: Foreign, files: Files, key: str, expected: set[str] | None) -> None:
    if key not in files.children():
        raise Damaged(f"{files.url}/{key} is missing")
    if key.endswith(".safetensors"):
        found: dict[str, TensorMeta] = {}
        for name, entry in read_safetensors(files, key).items():
            found[name] = TensorMeta(join("model", name), DTYPE_OF_TAG[entry.tag], entry.shape)
            foreign.add(found[name], Box.full(entry.shape), (key, entry.start))
    else:
        found = _add_pickled(foreign, files, key)
    if expected is not None and not expected <= set(found):
        missing = sorted(expected - set(found))
        raise Damaged(f"{files.url}/{key} lacks {missing[0][:200]!r}, which the index says is there")


def _add_pickled(foreign: Foreign, files: Files, key: str) -> dict[str, TensorMeta]:
    found: dict[str, TensorMeta] = {}
    root = read_torch(files, key).root
    if not isinstance(root, dict):
        raise Damaged(f"{files.url}/{key} is not a state dict")
    for name, tensor in root.items():
        if isinstance(tensor, StoredTensor) and isinstance(name, str):
            found[name] = TensorMeta(join("model", name), tensor.dtype, tensor.shape)
            foreign.add(found[name], Box.full(tensor.shape), tensor.where, tensor.block())
    return found


def _weight_map(files: Files, key: str) -> dict[str, str]:
    index = _json(files, key)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise Damaged(f"{files.url}/{key} has no weight_map")
    return weight_map


def _config(files: Files) -> dict[str, Any]:
    config = _json(files, CONFIG)
    if not isinstance(config, dict):
        raise Damaged(f"{files.url}/{CONFIG} is not a JSON object")
    return config


def _side_files(files: Files, names: set[str]) -> dict[str, Any]:
    return {key.removesuffix(".json"): _json(files, key) for key in SIDE_FILES if key in names}


def _json(files: Files, key: str) -> Any:
    try:
        return json.loads(files.read(key))
    except ValueError as error:
        raise Damaged(f"{files.url}/{key} is not JSON: {error}") from None


def _tie(foreign: Foreign, config: Mapping[str, Any]) -> None:
    """The other name of a tied embedding, which the files leave out (which one differs from model to model)."""
    text = config.get("text_config")
    tied = config.get(
        "tie_word_embeddings", text.get("tie_word_embeddings", False) if isinstance(text, dict) else False
    )
    names = {name.removeprefix(MODEL) for name in foreign.names()}
    inputs = [n for n in names if n.endswith(_INPUT_EMBEDDINGS)]
    outputs = [n for n in names if n in _OUTPUT_EMBEDDINGS]
    if not tied or (inputs and outputs):
        return
    if len(inputs) == 1:
        output = "embed_out.weight" if inputs[0].endswith("embed_in.weight") else "lm_head.weight"
        foreign.aliases[join("model", output)] = join("model", inputs[0])


# ---- writing ------------------------------------------------------------------------------------------------


def _weights(logical: Logical, dtype: str, *, masters: bool) -> tuple[list[Tensor], list[Note]]:
    tensors, cast, notes = [], 0, []
    names = set(logical.names())
    # Of a tied pair the files have the input embedding, whatever name it is stored under.
    spelt = {stored: alias for alias, stored in logical.aliases.items() if alias.endswith(_INPUT_EMBEDDINGS)}
    for name in sorted(n for n in names if n.startswith(MODEL)):
        key = "/".join(split(spelt.get(name, name) if not name.endswith(_INPUT_EMBEDDINGS) else name)[1:])
        master = f"{STATE}{name.removeprefix(MODEL)}/{MASTER}"
        meta = logical.meta(master if masters and master in names else name)
        wanted = dtype if dtype and meta.dtype.startswith(("float", "bfloat")) else meta.dtype
        cast += wanted != meta.dtype
        tensors.append(Tensor(key, wanted, meta.shape, meta.name, Box.full(meta.shape)))
    if not tensors:
        raise LayoutError(f"{logical.origin} has no tensors of a model", hint="their names must begin with 'model/'")
    if cast:
        notes.append(Note("lost", f"{cast} tensors are cast to {dtype}"))
    dropped = sum(not n.startswith((MODEL, "@")) for n in names)
    if dropped:
        notes.append(Note("lost", f"{dropped} tensors that are not the model's (optimizer state) have no place here"))
    return tensors, notes


def _groups(tensors: Sequence[Tensor], limit: int) -> list[list[Tensor]]:
    groups: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return groups


def _shard_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _index(shards: Sequence[str], groups: Sequence[Sequence[Tensor]]) -> Small:
    total = sum(t.nbytes for group in groups for t in group)
    elements = sum(t.nbytes // DTYPES[t.dtype].itemsize for group in groups for t in group)
    weight_map = {t.key: shard for shard, group in zip(shards, groups, strict=True) for t in group}
    metadata = {"total_parameters": elements, "total_size": total}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return Small(SINGLE + INDEX, json.dumps(index, indent=2).encode() + b"\n")


def _configs(logical: Logical, options: Mapping[str, str], dtype: str, notes: list[Note]) -> Sequence[Small]:
    own = logical.document().get("huggingface")
    side = dict(own) if isinstance(own, dict) else {}
    config = side.pop("config", None)
    if options.get("config"):
        path = Path(options["config"])
        try:
            config = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise InvalidInput(f"{path} cannot be read as JSON: {error}") from None
    small = [Small(f"{name}.json", json.dumps(value, indent=2).encode() + b"\n") for name, value in side.items()]
    if not isinstance(config, dict):
        notes.append(Note("warning", f"there is no {CONFIG}: give one with the option config=PATH"))
        return small
    if dtype:
        config = {**config, "torch_dtype" if "torch_dtype" in config else "dtype": dtype}
    return [*small, Small(CONFIG, json.dumps(config, indent=2).encode() + b"\n")]
