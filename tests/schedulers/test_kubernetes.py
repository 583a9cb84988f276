"""The manifest fits the published schemas of Kubernetes and JobSet, and says what the program does."""

import copy
from pathlib import Path
from typing import Any

import pytest

from ckptsvc.cli.run import command
from ckptsvc.config import load
from ckptsvc.errors import EXIT_STATUS

yaml = pytest.importorskip("yaml", reason="run make install")
models = pytest.importorskip("kubeflow_trainer_api.models", reason="run make install")

NO_PROGRESS = 86
"""Exit status of a job whose attempts fail one after the other."""

MANIFEST = Path(__file__).parents[2] / "deploy" / "kubernetes" / "jobset.yaml"


@pytest.fixture
def manifest() -> dict[str, Any]:
    return dict(yaml.safe_load(MANIFEST.read_text()))


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    return dict(job["template"]["spec"])


def unknown(manifest: dict[str, Any]) -> list[str]:
    """Fields that the schema does not have; a value of the wrong type is raised."""
    known = models.JobsetV1alpha2JobSet.from_dict(copy.deepcopy(manifest)).to_dict()
    return list(missing(manifest, known, ""))


def missing(given: Any, known: Any, path: str) -> Any:
    if isinstance(given, dict):
        for name, value in given.items():
            if not isinstance(known, dict) or name not in known:
                yield f"{path}.{name}"
            else:
                yield from missing(value, known[name], f"{path}.{name}")
    elif isinstance(given, list):
        for number, value in enumerate(given):
            yield from missing(value, known[number], f"{path}[{number}]")


def test_it_fits_the_schemas(manifest: dict[str, Any]) -> None:
    assert unknown(manifest) == []


def test_the_schemas_find_a_wrong_field_and_a_wrong_type(manifest: dict[str, Any]) -> None:
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["template"]["spec"]["containers"][0]["comand"] = ["x"]
    assert unknown(manifest) == [".spec.replicatedJobs[0].template.spec.template.spec.containers[0].comand"]
    job["parallelism"] = "many"
    with pytest.raises(ValueError, match="parallelism"):
        unknown(manifest)


def test_exit_statuses_decide_as_documented(manifest: dict[str, Any]) -> None:
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    by_status = {
        status: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
        for status in rule["onExitCodes"]["values"]
    }
    hopeless = {EXIT_STATUS[code] for code in ("config", "incompatible-version", "layout")} | {NO_PROGRESS}
    assert by_status == {EXIT_STATUS["interrupted"]: "Ignore", **dict.fromkeys(hopeless, "FailJob")}
    assert pod_of(manifest)["restartPolicy"] == "Never", "what a pod failure policy needs"


def test_both_containers_share_sockets_and_arenas_and_have_real_settings(manifest: dict[str, Any]) -> None:
    pod = pod_of(manifest)
    (agent,), (train,) = pod["initContainers"], pod["containers"]
    assert agent["restartPolicy"] == "Always", "a sidecar"
    assert agent["volumeMounts"] == train["volumeMounts"]
    assert {mount["name"] for mount in train["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    for container in (agent, train):
        values = {each["name"]: each.get("value", "name") for each in container["env"]}
        assert load(values, files=[]).agent.socket_dir == "/run/ckptsvc/agent"


def test_the_last_save_has_its_time_before_the_pod_is_killed(manifest: dict[str, Any]) -> None:
    pod = pod_of(manifest)
    program, name, *arguments = pod["containers"][0]["command"]
    assert (program, name) == ("ckptsvc", "run")
    given = command.make_context("run", list(arguments)).params
    assert given["script"] == "train.py"
    assert given["stop_grace"] < pod["terminationGracePeriodSeconds"]
