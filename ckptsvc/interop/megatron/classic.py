"""Megatron's classic checkpoints (`--ckpt-format torch`), read: one file for each model-parallel rank.

Models of Megatron-Core (`GPTModel`); see `megatron_ranks` for the folders. The last stage's copy of a tied embedding
becomes another name of it. Rows of padding of the vocabulary are kept. Options:

    optimizer=no    leave the optimizer's state out
    rules=FILE      layout rules of your own, for models that are not of the family `megatron` (see `geometry.rules`)
    bucket=N        elements after which the distributed optimizer began a new bucket, where it did
"""

from __future__ import annotations

from collections.abc import Mapping

from ckptsvc.errors import ConfigError
from ckptsvc.format.document import join
from ckptsvc.interop.files import Files
from ckptsvc.interop.logical import MODEL, STATE, Foreign, Note
from ckptsvc.interop.megatron.classic_optimizer import Optimizers
from ckptsvc.interop.megatron.files import checkpoint_folder, step_of, vocabulary_note, with_types
from ckptsvc.interop.megatron.names import EMBEDDING, OUTPUT, tied
from ckptsvc.interop.megatron.ranks import MODEL_FILE, Ranks, add_local, argument, is_chunk, is_folder, read_ranks
from ckptsvc.interop.naming.families import family, read_family, variables
from ckptsvc.interop.naming.tied import alias, equal
from ckptsvc.interop.plain import Plain

OPTIONS = ("optimizer", "rules", "bucket")
_MARK = "mp_rank_"


def detect(files: Files) -> bool:
    """Whether there are folders of ranks with files of Megatron's, or a folder of them."""
    folder = checkpoint_folder(files, _MARK)
    ranks = [name for name in files.children(folder.rstrip("/")) if is_folder(name)]
    return bool(ranks) and MODEL_FILE in files.children(folder + ranks[0])


def read(files: Files, origin: str, options: Mapping[str, str]) -> Foreign:
    """An `interop.formats.Importer`; options: see the module.

    Raises:
        NotFound: there is no such checkpoint.
        ConfigError: an option is not known.
        InvalidInput: which optimizer state belongs to which parameter is not certain; or a pickle names what is not on
            the list.
        Damaged, LayoutError: files are missing or contradict each other, or no rule takes a tensor.
    """
    if unknown := options.keys() - set(OPTIONS):
        raise ConfigError(f"{min(unknown)!r} is no option here", hint=f"options are {', '.join(OPTIONS)}")
    bucket = options.get("bucket", "0")
    if options.get("optimizer", "no") != "no" or not (bucket.isascii() and bucket.isdigit() and len(bucket) < 16):
        raise ConfigError("optimizer can only be no, and bucket is a number of elements")
    folder = checkpoint_folder(files, _MARK)
    model = read_family(options["rules"]) if "rules" in options else family("megatron")
    ranks = Ranks(read_ranks(files, folder), model.rules, origin)
    foreign = Foreign(origin, files)
    plain = Plain(foreign)
    first = ranks.ranks[0].root
    foreign.step = step_of(first, folder.rstrip("/"), origin)
    apart = {"optimizer", "rng_state"}
    rest = {str(k): v for k, v in first.items() if k not in apart and not is_chunk(k)}
    if "args" in rest:
        rest["args"] = with_types(rest["args"])
    foreign.plain["megatron"] = plain.value(rest, "megatron")
    _add_model(foreign, ranks)
    if "optimizer" in options:
        foreign.notes.append(Note("lost", "the optimizer's state was left out, as asked for"))
    else:
        Optimizers(foreign, ranks, plain, int(bucket), tied=_is_tied(ranks)).add()
    foreign.seal()
    foreign.aliases |= tied(ranks.shapes)
    _tie(foreign, ranks)
    plain.note()
    return foreign.seal()


def _add_model(foreign: Foreign, ranks: Ranks) -> None:
    extra: list[str] = []
    for rank in ranks.ranks:
        held = ranks.held(rank)
        extra += rank.extra
        for c, tensors in enumerate(rank.chunks):
            for name, tensor in tensors.items():
                mine = held[c, name]
                add_local(foreign, join(MODEL[:-1], mine.entry.name), mine.entry.shape, mine.local, tensor)
    if extra:
        foreign.notes.append(
            Note("lost", f"{len(extra)} values of `_extra_state` (Transformer Engine's FP8 scales), as {extra[0]}")
        )
    if any("rng_state" in rank.root for rank in ranks.ranks):
        foreign.notes.append(Note("lost", "rng_state: each rank of the old layout has its own"))
    if ranks.shapes.get(EMBEDDING):
        said = variables(foreign.plain, ranks.shapes).get("vocab")
        foreign.notes += vocabulary_note(ranks.shapes[EMBEDDING][0], said)


def _is_tied(ranks: Ranks) -> bool:
    """Whether the output layer, if it is there, may be a copy of the embedding, as later stages have it."""
    untied = argument(ranks.ranks[0].root, "untie_embeddings_and_output_weights")
    return ranks.placement.parallel.pp > 1 and untied is not True


def _tie(foreign: Foreign, ranks: Ranks) -> None:
    """Make one tensor of the embedding and its copy on the last stage, of which the first stage's is kept."""
    kept, other = join(MODEL[:-1], EMBEDDING), join(MODEL[:-1], OUTPUT)
    if not _is_tied(ranks) or kept not in foreign or other not in foreign:
        return
    said = argument(ranks.ranks[0].root, "untie_embeddings_and_output_weights") is False
    same = equal(foreign, kept, other)
    if not same and not (said and foreign.meta(kept)[1:] == foreign.meta(other)[1:]):
        return
    if not same:
        foreign.notes.append(
            Note("warning", f"the copies of {EMBEDDING} on the first and last stage differ; the first's is kept")
        )
    slots = [name for name in foreign.names() if name.startswith(f"{join(STATE[:-1], OUTPUT)}/")]
    differ = []
    for name in slots:
        first = join(STATE[:-1], EMBEDDING, name.rsplit("/", 1)[1])
        if first not in foreign or not equal(foreign, first, name):
            differ.append(name)
    for name in slots:
        foreign.drop(name)
    alias(foreign, kept, other)
    if differ:
        foreign.notes.append(
            Note("warning", f"optimizer state of {OUTPUT}, a copy of {EMBEDDING}, differs from that of the first stage,"
                 f" which is kept: {', '.join(differ)}")
        )  # fmt: skip
    for group in foreign.plain.get("optimizer", {}).get("param_groups", []):
        if OUTPUT in group["params"]:
            group["params"].remove(OUTPUT)
