"""Cluster files are what Ray and Kubernetes take, name things that exist, and hold no secret. No cloud is called."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from aptp_ray.config import load_config
from aptp_ray.serve.environment import SERVE_ENVIRONMENT

REPOSITORY = Path(__file__).resolve().parents[1]
CLUSTERS = REPOSITORY / "clusters"
AUTOSCALER = ("aws", "gcp")
KUBERAY = {"raycluster": "RayCluster", "rayjob": "RayJob", "rayservice": "RayService"}
FILES = sorted(path for path in [*CLUSTERS.rglob("*"), REPOSITORY / "jobs" / "runtime_env.yaml"] if path.is_file())

SECRETS = {
    "AWS key id": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "token": r"\b(hf_|ghp_|glpat-|xox[bp]-|sk-)[A-Za-z0-9_-]{16,}",
    "long hex": r"\b[0-9a-f]{40}\b",
    "assigned secret": r"(?i)\b(secret_?access_?key|password|api_?key|token)\b['\"]?\s*[:=]\s*['\"]?[A-Za-z0-9/+_-]{16,}",
}
REGISTRY = (
    r"(?i)\b(pypi|pythonhosted|docker|ghcr|gcr|quay|nvcr|huggingface|anaconda)\.(org|io|co|com)\b"
    r"|\.dkr\.ecr\.|\.pkg\.dev\b"
)


def parse(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text())


# -- all files -----------------------------------------------------------------------------------------------------------------


def test_the_expected_files_are_there() -> None:
    names = {str(path.relative_to(REPOSITORY)) for path in FILES}
    assert names >= {"clusters/Dockerfile", "clusters/aws.yaml", "clusters/gcp.yaml", "jobs/runtime_env.yaml"}
    assert names >= {f"clusters/kuberay/{name}.yaml" for name in (*KUBERAY, "podmonitor")}
    assert names >= {"clusters/fleet.yaml", "clusters/grafana/dashboard.json", "clusters/grafana/README.md"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_secret_and_no_registry_host(path: Path) -> None:
    text = path.read_text()
    found = {name: match.group() for name, pattern in SECRETS.items() if (match := re.search(pattern, text))}
    assert not found and not re.search(REGISTRY, text)


@pytest.mark.parametrize(
    "text",
    ["key: AKIAABCDEFGHIJKLMNOP", "password: correcthorsebatterystaple", f"WANDB_API_KEY={'0123456789abcdef' * 2}01234567"]
)
def test_a_secret_would_be_found(text: str) -> None:
    assert any(re.search(pattern, text) for pattern in SECRETS.values())


# -- ray up --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=AUTOSCALER)
def prepared(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The file as `ray up` sees it: with Ray's defaults, and refused if Ray's schema refuses it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(parse(request.param))
    validate_config(config)
    return config


def test_autoscaler_node_types(prepared: dict[str, Any]) -> None:
    types = dict(prepared["available_node_types"])
    head = types.pop(prepared["head_node_type"])
    assert "GPU" not in head["resources"] and head["max_workers"] == 0
    assert all(node["min_workers"] == 0 < node["max_workers"] for node in types.values())
    spot = {name for name, node in types.items() if re.search(r"spot", str(node["node_config"]), re.IGNORECASE)}
    gpu = {name for name, node in types.items() if node["resources"].get("GPU", 0) > 0}
    assert gpu & spot and gpu - spot, "GPU workers both from the spot market and on demand"
    assert set(types) - gpu, "workers without GPUs, for data"
    # Every node can be asked for, whatever the others take: the cluster's limit is not the smallest of theirs.
    assert prepared["max_workers"] >= max(node["max_workers"] for node in types.values())
    assert not [key for node in types.values() for key, value in node["node_config"].items() if value is None]


def test_autoscaler_opens_nothing_and_installs_nothing(prepared: dict[str, Any]) -> None:
    start = " ".join(prepared["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start and "--autoscaling-config=" in start
    assert "0.0.0.0" not in str(prepared)
    # Every process of every node asks for the token, which is no part of the file: it comes from the user's own machine.
    assert "--env RAY_AUTH_MODE=token" in prepared["docker"]["run_options"]
    assert prepared["file_mounts"]["/home/ray/.ray/auth_token"].endswith("/.ray/auth_token")
    installing = ("setup_commands", "head_setup_commands", "worker_setup_commands")
    assert not any(prepared.get(name) for name in installing), "Ray's defaults would put another Ray over the image's"
    assert prepared["docker"]["image"] and prepared["docker"]["container_name"]


def test_gpu_nodes_hold_a_train_worker_and_leave_cpus_for_data(prepared: dict[str, Any]) -> None:
    compute = load_config(REPOSITORY / "jobs" / "configs" / "sd21_cc3m.yaml").compute
    nodes = [n["resources"] for n in prepared["available_node_types"].values() if n["resources"].get("GPU")]
    for node in nodes:
        workers = node["GPU"] // compute.gpus_per_worker
        assert workers >= 1 and node["CPU"] - workers * compute.cpus_per_worker >= node["GPU"]


# -- Kubernetes ----------------------------------------------------------------------------------------------------------------


def cluster_spec(name: str) -> dict[str, Any]:
    spec = parse(f"kuberay/{name}")["spec"]
    return {"raycluster": spec, "rayjob": spec.get("rayClusterSpec"), "rayservice": spec.get("rayClusterConfig")}[name]


def pods(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    spec = cluster_spec(name)
    yield "head", spec["headGroupSpec"]["template"]["spec"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


@pytest.mark.parametrize(("name", "kind"), KUBERAY.items())
def test_kuberay_objects(name: str, kind: str) -> None:
    tree, spec = parse(f"kuberay/{name}"), cluster_spec(name)
    assert (tree["apiVersion"], tree["kind"]) == ("ray.io/v1", kind)
    label = tree["metadata"].get("name") or tree["metadata"]["generateName"].rstrip("-")
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", label) and len(label) < 41
    assert re.fullmatch(r"\d+\.\d+\.\d+", spec["rayVersion"]) and spec["enableInTreeAutoscaling"] is True
    head = spec["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0" and head["serviceType"] == "ClusterIP"
    assert not spec.get("enableIngress") and "enableIngress" not in head
    names = [group["groupName"] for group in spec["workerGroupSpecs"]]
    assert len(names) == len(set(names)) > 0
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert kind == "RayService" or group["minReplicas"] == 0
        # KubeRay's start parameters are strings.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


# Fields of KubeRay's custom resources (version 1.5), below which Kubernetes' own begin: what is not here, the operator ignores or
# its schema refuses.
FIELDS = {
    "RayCluster": "suspend managedBy autoscalerOptions headServiceAnnotations enableInTreeAutoscaling gcsFaultToleranceOptions "
    "headGroupSpec rayVersion workerGroupSpecs authOptions upgradeStrategy",
    "headGroupSpec": "template headService enableIngress rayStartParams serviceType labels resources",
    "workerGroupSpecs": "groupName replicas minReplicas maxReplicas rayStartParams template scaleStrategy numOfHosts "
    "idleTimeoutSeconds suspend labels resources",
    "autoscalerOptions": "resources image imagePullPolicy securityContext idleTimeoutSeconds upscalingMode version env envFrom "
    "volumeMounts",
    "authOptions": "mode",
    "RayJob": "activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata clusterSelector submitterConfig "
    "managedBy deletionStrategy entrypoint runtimeEnvYAML jobId submissionMode entrypointResources entrypointNumCpus "
    "entrypointNumGpus ttlSecondsAfterFinished shutdownAfterJobFinishes suspend preRunningDeadlineSeconds",
    "RayService": "serviceUnhealthySecondThreshold deploymentUnhealthySecondThreshold serveService upgradeStrategy serveConfigV2 "
    "rayClusterConfig excludeHeadPodFromServeSvc rayClusterDeletionDelaySeconds",
    "clusterUpgradeOptions": "gatewayClassName maxSurgePercent stepSizePercent intervalSeconds",
    "pod": "serviceAccountName securityContext containers volumes nodeSelector tolerations affinity initContainers "
    "terminationGracePeriodSeconds priorityClassName topologySpreadConstraints",
    "container": "name image imagePullPolicy securityContext env envFrom resources volumeMounts ports lifecycle command args "
    "livenessProbe readinessProbe",
}


def unknown(kind: str, tree: dict[str, Any]) -> set[str]:
    return {f"{kind}.{name}" for name in set(tree) - set(FIELDS[kind].split())}


@pytest.mark.parametrize(("name", "kind"), KUBERAY.items())
def test_every_field_is_one_of_the_operators(name: str, kind: str) -> None:
    tree, spec = parse(f"kuberay/{name}"), cluster_spec(name)
    wrong = unknown(kind, tree["spec"]) | unknown("RayCluster", spec)
    for part in ("headGroupSpec", "autoscalerOptions", "authOptions"):
        wrong |= unknown(part, spec[part])
    for group in spec["workerGroupSpecs"]:
        wrong |= unknown("workerGroupSpecs", group)
    for _, pod in pods(name):
        wrong |= unknown("pod", pod)
        for container in pod["containers"]:
            wrong |= unknown("container", container)
    assert not wrong and set(tree) == {"apiVersion", "kind", "metadata", "spec"}


def test_a_misspelled_field_would_be_found() -> None:
    assert unknown("RayCluster", {"enableInTreeAutoScaling": True}) == {"RayCluster.enableInTreeAutoScaling"}


@pytest.mark.parametrize("name", KUBERAY)
def test_tokens_are_asked_for_from_a_ray_that_has_them(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert tuple(map(int, spec["rayVersion"].split("."))) >= (2, 52, 0)


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_are_locked_down_and_sized(name: str) -> None:
    gpus = 0
    for group, pod in pods(name):
        assert pod["securityContext"]["runAsNonRoot"] is True, group
        (container,) = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["resources"]["requests"] == container["resources"]["limits"], "Ray counts on what it was given"
        gpus += int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
        memory, shared = container["resources"]["limits"]["memory"], volumes["shm"]["emptyDir"]["sizeLimit"]
        # Ray takes at most 30 % of the memory for its object store, if /dev/shm is that large.
        assert 0.2 <= int(shared.removesuffix("Gi")) / int(memory.removesuffix("Gi")) <= 0.5
        for variable in container["env"]:
            assert "value" not in variable, "values of secrets stay in the cluster"
    assert gpus > 0


def test_the_three_objects_and_the_autoscaler_files_use_one_image() -> None:
    images = {pod["containers"][0]["image"] for name in KUBERAY for _, pod in pods(name)}
    images |= {parse(name)["docker"]["image"] for name in AUTOSCALER}
    assert len(images) == 1 and len({cluster_spec(name)["rayVersion"] for name in KUBERAY}) == 1


def test_the_ray_jobs_entrypoint_exists_and_its_config_loads() -> None:
    spec = parse("kuberay/rayjob")["spec"]
    python, script, config, *overrides = shlex.split(spec["entrypoint"])
    assert python == "python" and (REPOSITORY / script.removeprefix("/app/")).is_file()
    loaded = load_config(REPOSITORY / config.removeprefix("/app/"), overrides)
    assert loaded.run_dir.startswith("s3://")
    assert spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > 0 and spec["submissionMode"] in {"K8sJobMode", "HTTPMode"}
    env = yaml.safe_load(spec["runtimeEnvYAML"])
    assert all(isinstance(value, str) for value in env["env_vars"].values())


def test_the_ray_services_application_is_ours() -> None:
    with warnings.catch_warnings():  # Ray's own deprecated pydantic fields, told of once at import
        warnings.simplefilter("ignore", DeprecationWarning)
        from ray.serve.schema import ServeDeploySchema

        from aptp_ray.serve import app

    spec = parse("kuberay/rayservice")["spec"]
    deployed = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    (application,) = deployed.applications
    module, _, builder = application.import_path.partition(":")
    assert module == app.__name__ and callable(getattr(app, builder))
    assert app.ServeArgs.model_validate(application.args).run_dir.startswith("s3://")
    assert deployed.http_options.port == 8000 and application.route_prefix == "/"
    # An upgrade does not ask for all GPUs twice.
    strategy = spec["upgradeStrategy"]
    assert strategy["type"] == "NewClusterWithIncrementalUpgrade" and not unknown(
        "clusterUpgradeOptions", strategy["clusterUpgradeOptions"]
    )
    assert 0 < strategy["clusterUpgradeOptions"]["stepSizePercent"] <= strategy["clusterUpgradeOptions"]["maxSurgePercent"] <= 50


# -- metrics -------------------------------------------------------------------------------------------------------------------


def documented_metrics() -> dict[str, tuple[str, set[str]]]:
    """Name -> (kind, tags), of the service's own metrics."""
    from aptp_ray.serve import metrics

    rows = re.findall(r"^\| ``(aptp_\w+)`` \| (\w+) \| ([^|]+) \|", metrics.__doc__ or "", re.MULTILINE)
    return {name: (kind, set(re.findall(r"``(\w+)``", tags))) for name, kind, tags in rows}


def dashboard_queries() -> list[str]:
    tree = json.loads((CLUSTERS / "grafana" / "dashboard.json").read_text())
    queries = [target["expr"] for panel in tree["panels"] for target in panel.get("targets", [])]
    return queries + [entry["definition"] for entry in tree["templating"]["list"] if "definition" in entry]


def test_the_dashboard_shows_every_metric_of_the_service_and_no_other() -> None:
    known, text = documented_metrics(), (REPOSITORY / "aptp_ray" / "serve" / "metrics.py").read_text()
    assert len(known) > 10 and all(f'"{name}"' in text for name in known)  # the documented ones are those that are made
    suffixes = {"counter": {"_total"}, "gauge": {""}, "histogram": {"_bucket", "_sum", "_count"}}
    exported = {f"ray_{name}{suffix}": name for name, (kind, _) in known.items() for suffix in suffixes[kind]}
    used = {name for query in dashboard_queries() for name in re.findall(r"\bray_aptp_\w+", query)}
    assert used <= set(exported), used - set(exported)
    assert {exported[name] for name in used} == set(known)


def test_the_dashboard_asks_for_tags_that_its_metrics_have() -> None:
    known = documented_metrics()
    for query in dashboard_queries():
        for name, selector in re.findall(r"\bray_(aptp_\w+?)(?:_total|_bucket|_sum|_count)?\{([^}]*)\}", query):
            tags = known[name][1] | {"deployment", "replica", "application"}
            asked = set(re.findall(r"(\w+)(?:=~|!=|!~|=)", selector))
            assert asked <= tags, f"{name} has no {asked - tags}"
        # Rates over counters and histograms alone.
        assert not re.search(r"rate\(ray_aptp_in_flight", query)


def test_the_dashboards_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = json.loads((CLUSTERS / "grafana" / "dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


def test_prometheus_finds_the_pods() -> None:
    tree = parse("kuberay/podmonitor")
    assert (tree["apiVersion"], tree["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    (expression,) = tree["spec"]["selector"]["matchExpressions"]
    assert expression == {"key": "ray.io/node-type", "operator": "In", "values": ["head", "worker"]}  # KubeRay's labels
    assert [endpoint["port"] for endpoint in tree["spec"]["podMetricsEndpoints"]] == ["metrics"]


# -- image and working directory -----------------------------------------------------------------------------------------------


def test_the_image_is_small_runs_as_no_root_and_copies_what_exists() -> None:
    lines = re.sub(r"\\\n", " ", (CLUSTERS / "Dockerfile").read_text()).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    assert next(rest for word, rest in steps if word == "FROM") == "python:${PYTHON}-slim"
    assert next(rest for word, rest in steps if word == "ARG") == "PYTHON=3.11"
    users = [rest for word, rest in steps if word == "USER"]
    assert users and users[-1] not in {"root", "0"}
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (asked,) = re.findall(r'pip install --no-cache-dir "\.\[([\w,]+)\]"', " ".join(rest for word, rest in steps if word == "RUN"))
    assert set(asked.split(",")) <= set(extras)
    copied = {name for word, rest in steps if word == "COPY" for name in rest.split()[:-1] if not name.startswith("--")}
    assert copied == {"pyproject.toml", "README.md", "LICENSE", "NOTICE", "aptp_ray", "jobs"}
    assert copied - {"pyproject.toml", "README.md"} <= {path.name for path in REPOSITORY.iterdir()}


def test_serves_processes_run_in_the_image_as_jobs_start_them() -> None:
    text = re.sub(r"^ *#.*\n", "", (CLUSTERS / "Dockerfile").read_text(), flags=re.M)
    told = dict(re.findall(r"(RAY_SERVE_\w+)=(\S+)", text))
    assert told == SERVE_ENVIRONMENT


def test_what_travels_with_a_job(tmp_path: Path) -> None:
    """Packs a small copy of a checkout as `ray job submit --working-dir` does."""
    from ray._private.runtime_env.packaging import create_package
    from ray.runtime_env import RuntimeEnv

    tree = yaml.safe_load((REPOSITORY / "jobs" / "runtime_env.yaml").read_text())
    environment = RuntimeEnv(**tree)
    stays = (
        ".git/HEAD", ".venv/bin/python", "runs/x/manifest.json", "wandb/run/log", "jobs/wandb/run/log", "tests/test_x.py",
        "aptp_ray/__pycache__/x.pyc", ".pytest_cache/x", ".mypy_cache/x", "data/train/0.tar", "shards/0.tar", ".env", "key.pem",
        "aptp_ray.egg-info/PKG-INFO", "build/lib/x.py", "part-0.parquet", ".hypothesis/x", "id.key", "my-credentials.json",
    )  # fmt: skip
    travels = (
        "aptp_ray/__init__.py", "aptp_ray/data/schema.py", "aptp_ray/demo/weights/unet/diffusion_pytorch_model.safetensors",
        "aptp_ray/serve/web/index.html", "aptp_ray/credentials.py", "clusters/fleet.yaml",
        "jobs/pipeline.py", "jobs/configs/openmoji.yaml", "pyproject.toml", "README.md",
    )  # fmt: skip
    for name in stays + travels:
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    package = tmp_path / "package.zip"
    create_package(str(tmp_path / "checkout"), package, include_gitignore=False, excludes=environment["excludes"])
    with zipfile.ZipFile(package) as archive:
        assert {name for name in archive.namelist() if not name.endswith("/")} == set(travels)
