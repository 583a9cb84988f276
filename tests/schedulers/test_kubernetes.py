"""The manifest fits the published schemas of Kubernetes and JobSet, and says what the program does."""

import copy
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from harness.schemas import missing

from ckptsvc.cli.run import command
from ckptsvc.config import load
from ckptsvc.errors import EXIT_STATUS

yaml = pytest.importorskip("yaml", reason="run make install")
models = pytest.importorskip("kubeflow_trainer_api.models", reason="run make install")

NO_PROGRESS = 86
"""Exit status of a job whose attempts fail one after the other."""

DEPLOY = Path(__file__).parents[2] / "deploy"
MANIFEST = DEPLOY / "kubernetes" / "jobset.yaml"


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


@pytest.fixture(scope="module")
def overlay() -> dict[str, dict[str, Any]]:
    """What the example of an overlay comes to, by kind."""
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    command = ["kubectl", "kustomize", str(DEPLOY / "kubernetes-example")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {document["kind"]: document for document in yaml.safe_load_all(done.stdout)}


def test_an_overlay_fits_the_schemas_too(overlay: dict[str, dict[str, Any]]) -> None:
    assert unknown(overlay["JobSet"]) == []


def test_an_overlay_changes_what_it_says_and_nothing_else(
    overlay: dict[str, dict[str, Any]], manifest: dict[str, Any]
) -> None:
    before, after = pod_of(manifest), pod_of(overlay["JobSet"])
    containers = ([*pod["initContainers"], *pod["containers"]] for pod in (before, after))
    for old, new in zip(*containers, strict=True):
        assert new["image"] == "images.example.org/training/ckptsvc:0.1.0"
        assert new["command"] == old["command"]
        assert new["env"] == old["env"]
        assert new["volumeMounts"][-1] == {"name": "settings", "mountPath": "/etc/ckptsvc", "readOnly": True}
    volumes = {each["name"]: each for each in after["volumes"]}
    assert volumes["checkpoints"]["persistentVolumeClaim"]["claimName"] == "lustre-training"
    assert volumes["arenas"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "256Gi"}
    assert volumes["settings"]["configMap"]["name"] == overlay["ConfigMap"]["metadata"]["name"]
    assert after["securityContext"] == before["securityContext"]


def test_its_settings_are_settings(overlay: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    text = overlay["ConfigMap"]["data"]["config.toml"]
    (tmp_path / "config.toml").write_text(text)
    found = load({}, files=[tmp_path / "config.toml"])
    assert found.save.keep == tomllib.loads(text)["save"]["keep"]
