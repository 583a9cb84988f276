"""The rules of the house that no linter knows: sizes, names, imports, no pickle, one table of errors.

Each scanner is also shown a text that breaks its rule, so that a scanner that sees nothing fails too.
"""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ckptsvc import errors
from ckptsvc.errors import BY_CODE, EXIT_STATUS, GRPC_STATUS, CkptsvcError
from ckptsvc.types import DTYPE_BY_CODE, DTYPES

ROOT = Path(__file__).resolve().parents[2]
MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 60

LONG_ON_PURPOSE: dict[str, str] = {}
"""Modules ("ckptsvc/x.py") and functions ("ckptsvc/x.py:function") that are longer, each with the reason."""

DUMPING_GROUNDS = {"utils", "util", "helpers", "helper", "common", "misc"}
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
WITHOUT_TORCH = ("agent", "launch", "pipeline", "control", "format", "geometry", "storage", "rpc", "cli.main")
REFUSED_DTYPES = dict.fromkeys(
    ("qint8", "quint8", "qint32", "quint4x2", "quint2x4"),
    "quantised: the bytes mean nothing without a scale and a zero point, which are not among them",
)


def sources() -> list[Path]:
    found = [path for room in ("ckptsvc", "storage_drivers") for path in sorted((ROOT / room).rglob("*.py"))]
    return [path for path in found if "_pb2" not in path.name]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    parts = (
        path.relative_to(ROOT / "storage_drivers" if "storage_drivers" in path.parts else ROOT).with_suffix("").parts
    )
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# ---- sizes and names


def too_long(name: str, text: str) -> Iterator[str]:
    if text.count("\n") > MAX_MODULE_LINES:
        yield name
    for node in ast.walk(ast.parse(text)):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES:
            yield f"{name}:{node.name}"


def test_modules_and_functions_fit_in_a_head() -> None:
    assert list(too_long("x", "def f():\n" + " 1\n" * 60)) == ["x:f"]
    assert list(too_long("x", "#\n" * 501)) == ["x"]
    assert list(too_long("x", "#\n" * 440 + "def f():\n" + " 1\n" * 59)) == []
    found = {name for path in sources() for name in too_long(name_of(path), path.read_text())}
    assert found - LONG_ON_PURPOSE.keys() == set()
    assert LONG_ON_PURPOSE.keys() - found == set(), "no longer needed"


def test_no_module_is_a_dumping_ground() -> None:
    names = {part for path in sources() for part in path.relative_to(ROOT).with_suffix("").parts}
    assert {"ckptsvc", "errors"} <= names
    assert {name for name in names if name.strip("_") in DUMPING_GROUNDS} == set()


# ---- no pickle


def unpicklings(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name.split(".")[0] in PICKLES)
            case ast.ImportFrom(module=module) if (module or "").split(".")[0] in PICKLES:
                yield str(module)
            case ast.ImportFrom(module="torch" | "torch.serialization", names=names):
                yield from (f"torch.{alias.name}" for alias in names if alias.name == "load")
            case ast.Call(func=ast.Attribute(value=value, attr="load"), keywords=given):
                whose = ast.unparse(value)
                if whose in {"torch", "torch.serialization"} and not says(given, "weights_only", value=True):
                    yield "torch.load"
                if whose in {"np", "numpy"} and any(keyword.arg == "allow_pickle" for keyword in given):
                    yield "numpy.load(allow_pickle)"


def says(keywords: list[ast.keyword], name: str, *, value: object) -> bool:
    given = {keyword.arg: keyword.value for keyword in keywords}
    return isinstance(given.get(name), ast.Constant) and given[name].value is value


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import os, dill as d",
        "def f():\n from marshal import loads",
        "from cloudpickle.cloudpickle import dumps",
        "from torch import load",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_the_scanner_knows_pickle_when_it_sees_it(text: str) -> None:
    assert list(unpicklings(text))
    assert not list(unpicklings("torch.load(f, weights_only=True)\nnp.load(f)\njson.load(f)\nimport picklejar"))


def test_no_pickle_anywhere() -> None:
    found = {name_of(path): list(unpicklings(path.read_text())) for path in sources()}
    # the restricted reader of foreign pickles builds what is on its list and nothing else (tests/unit/interop)
    assert {name: calls for name, calls in found.items() if calls} == {
        "ckptsvc/interop/torch_format/pickles.py": ["pickle"]
    }


# ---- imports


def imported_after(statements: str) -> set[str]:
    """Top-level modules that are loaded in a fresh interpreter after `statements`."""
    code = f"{statements}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return set(ended.stdout.split())


def test_import_ckptsvc_is_light() -> None:
    heavy = {"torch", "numpy", "grpc", "google", "prometheus_client", "rich"}
    assert all(importlib.util.find_spec(name) for name in heavy), "not installed, so this would prove nothing"
    assert imported_after("import ckptsvc") & heavy == set()


def test_the_agent_and_all_below_it_run_without_torch() -> None:
    rooms = tuple(f"ckptsvc.{room}." for room in WITHOUT_TORCH)
    modules = [
        module_of(path)
        for path in sources()
        if path.parent in {ROOT / "ckptsvc", ROOT / "storage_drivers" / "ckptsvc_drivers"}
        or f"{module_of(path)}.".startswith(rooms)
    ]
    assert {"ckptsvc", "ckptsvc.config", "ckptsvc.agent", "ckptsvc_drivers.posix"} <= set(modules)
    loaded = imported_after("\n".join(f"import {name}" for name in modules if not name.endswith("__main__")))
    assert {"ckptsvc", "ckptsvc_drivers"} <= loaded
    assert loaded & {"torch", "torchdata"} == set()


# ---- errors


def tree_in_docstring() -> dict[str, str]:
    """Child -> parent, by the indentation of the tree that the docstring of errors.py draws."""
    parents: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        if entry := re.match(r"( {4,})([A-Z]\w+)(  |$)", line):
            indent, name = len(entry[1]), entry[2]
            path = [above for above in path if above[0] < indent]
            parents[name] = path[-1][1] if path else "Exception"
            path.append((indent, name))
    return parents


def test_the_docstring_draws_the_tree_of_errors_that_is() -> None:
    real = {cls.__name__: cls.__mro__[1].__name__ for cls in BY_CODE.values()}
    assert tree_in_docstring() == real


def test_each_error_has_its_own_code_an_exit_status_and_a_grpc_status() -> None:
    def tree(cls: type[CkptsvcError]) -> list[type[CkptsvcError]]:
        return [cls, *(leaf for sub in cls.__subclasses__() for leaf in tree(sub))]

    classes = [cls for cls in tree(CkptsvcError) if cls.__module__ == errors.__name__]
    assert sorted(cls.code for cls in classes) == sorted(BY_CODE), "two classes share a code"
    assert set(BY_CODE) == set(EXIT_STATUS) == set(GRPC_STATUS)
    import grpc

    assert set(GRPC_STATUS.values()) <= {status.name for status in grpc.StatusCode}
    # 0 is success, 3 partial success, 126 and up belong to the shell and to signals
    assert all(0 < status < 126 and status != 3 for status in EXIT_STATUS.values())


def test_an_error_reads_as_what_and_hint() -> None:
    assert str(errors.Damaged("the shard ends early", hint="restore an older one")) == (
        "the shard ends early (restore an older one)"
    )
    assert str(errors.Damaged("the shard ends early")) == "the shard ends early"


# ---- element types


def torch_dtypes() -> dict[str, torch.dtype]:
    found = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    return {str(dtype).removeprefix("torch."): dtype for dtype in found}


def test_every_torch_dtype_is_stored_or_refused_for_a_reason() -> None:
    assert torch_dtypes().keys() - DTYPES.keys() - REFUSED_DTYPES.keys() == set()
    assert DTYPES.keys() & REFUSED_DTYPES.keys() == set()
    for name, dtype in torch_dtypes().items():
        assert name in REFUSED_DTYPES or DTYPES[name].itemsize == dtype.itemsize


def test_codes_of_element_types_are_unique_and_fit_in_a_byte() -> None:
    assert len(DTYPE_BY_CODE) == len(DTYPES)
    assert all(0 <= code < 256 for code in DTYPE_BY_CODE)
    tags = [dtype.tag for dtype in DTYPES.values() if dtype.tag]
    assert len(tags) == len(set(tags))
