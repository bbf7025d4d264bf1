"""The deployment files, as far as they can be checked without Docker or a cluster."""

import functools
import http.server
import importlib.resources
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import threading

import jsonschema
import kubernetes_validate
import pytest
import yaml
from dockerfile_parse import DockerfileParser
from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

from export.__main__ import NAMES
from export.__main__ import build_parser as build_export_parser
from export.saved_model import DEFAULT, write_config
from serving.__main__ import build_parser as build_serving_parser

ROOT = pathlib.Path(__file__).parents[1]
DEPLOY = ROOT / "serving" / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ("cpu", "gpu", "split")
BUILT = [KUBERNETES / "base", *(KUBERNETES / "overlays" / name for name in (*OVERLAYS, "split/denoiser"))]
PIPELINE = ("text_encoder", "diffusion_model", "decoder")
GRPC, REST = 8500, 8501

# of tensorflow_model_server; it starts with others too, and only its log says so
SERVER_FLAGS = set(
    """port grpc_socket_path rest_api_port rest_api_num_threads rest_api_timeout_in_ms rest_api_enable_cors_support
    enable_batching batching_parameters_file enable_per_model_batching_parameters
    allow_version_labels_for_unavailable_models model_config_file model_config_file_poll_wait_seconds model_name
    model_base_path num_load_threads num_unload_threads max_num_load_retries load_retry_interval_micros
    file_system_poll_wait_seconds flush_filesystem_caches tensorflow_session_parallelism
    tensorflow_session_config_file tensorflow_intra_op_parallelism tensorflow_inter_op_parallelism
    use_alts_credentials ssl_config_file platform_config_file per_process_gpu_memory_fraction saved_model_tags
    grpc_channel_arguments grpc_max_threads enable_model_warmup num_request_iterations_for_warmup version
    monitoring_config_file remove_unused_fields_from_bundle_metagraph prefer_tflite_model num_tflite_pools
    num_tflite_interpreters_per_pool enable_signature_method_name_check xla_cpu_compilation_enabled
    xla_gpu_compilation_enabled enable_profiler thread_pool_factory_config_file enable_grpc_healthcheck_service
    enable_serialization_as_tensor_content mixed_precision skip_initialize_tpu""".split()
)


# === kustomize: the features that the overlays use, and an error for every other ===


def build(folder):
    """What `kubectl kustomize folder` prints, as a list of resources; generated names go without their hash."""
    spec = dict(yaml.safe_load((folder / "kustomization.yaml").read_text()))
    resources = []
    for entry in spec.pop("resources", ()):
        path = folder / entry
        resources += build(path) if path.is_dir() else yaml.safe_load_all(path.read_text())
    for component in spec.pop("components", ()):
        transform(resources, folder / component)
    kinds = {spec.pop("apiVersion"), spec.pop("kind")}
    assert kinds == {"kustomize.config.k8s.io/v1beta1", "Kustomization"}
    apply(resources, folder, spec)
    return resources


def transform(resources, folder):
    spec = dict(yaml.safe_load((folder / "kustomization.yaml").read_text()))
    assert spec.pop("apiVersion") == "kustomize.config.k8s.io/v1alpha1" and spec.pop("kind") == "Component"
    apply(resources, folder, spec)


def apply(resources, folder, spec):
    for generator in spec.pop("configMapGenerator", ()):
        generate(resources, folder, dict(generator))
    for patch in spec.pop("patches", ()):
        assert set(patch) == {"target", "patch"} and set(patch["target"]) == {"kind"}
        targets = [resource for resource in resources if resource["kind"] == patch["target"]["kind"]]
        assert targets, f"{folder}: a patch hits nothing"
        for target in targets:
            for operation in yaml.safe_load(patch["patch"]):
                change(target, **operation)
    suffix = spec.pop("nameSuffix", "")
    renamed = {(resource["kind"], resource["metadata"]["name"]) for resource in resources}
    for resource in resources:
        resource["metadata"]["name"] += suffix
        for kind, holder, key in references(resource):
            if (kind, holder[key]) in renamed:
                holder[key] += suffix
    for label in spec.pop("labels", ()):
        assert set(label) == {"pairs", "includeSelectors"} and label["includeSelectors"]
        for labels in (labels for resource in resources for labels in selections(resource)):
            labels.update(label["pairs"])
    for image in spec.pop("images", ()):
        assert set(image) == {"name", "newTag"}
        found = [x for x in containers(resources) if x["image"].split(":")[0] == image["name"]]
        assert found, f"{folder}: no container has the image {image['name']}"
        for container in found:
            container["image"] = f"{image['name']}:{image['newTag']}"
    assert not spec, f"{folder}: {sorted(spec)} are not among the features built here"


def generate(resources, folder, generator):
    name, behavior = generator.pop("name"), generator.pop("behavior", "create")
    data = {file: (folder / file).read_text() for file in generator.pop("files", ())}
    for file in generator.pop("envs", ()):
        data.update(read_env((folder / file).read_text()))
    data.update(read_env("\n".join(generator.pop("literals", ()))))
    assert not generator
    old = [x for x in resources if x["kind"] == "ConfigMap" and x["metadata"]["name"] == name]
    assert len(old) == (behavior == "merge"), f"{folder}: {behavior} of ConfigMap {name}"
    if old:
        assert set(data) <= set(old[0]["data"]), f"{folder}: settings that nothing reads"
        old[0]["data"].update(data)
    else:
        resources.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data})


def change(resource, op, path, value):
    """An operation of a JSON patch (RFC 6902)."""
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]
    place = functools.reduce(lambda x, part: x[int(part) if isinstance(x, list) else part], parents, resource)
    assert op in ("add", "replace") and isinstance(place, dict)
    assert (last in place) == (op == "replace"), f"{op} {path}: it is {'' if last in place else 'not '}there"
    place[last] = value


def references(resource):
    """Where a resource names others: (kind, dict, key)."""
    if resource["kind"] == "HorizontalPodAutoscaler":
        target = resource["spec"]["scaleTargetRef"]
        yield target["kind"], target, "name"
    for pod in pods([resource]):
        for container in pod["containers"]:
            for source in container.get("envFrom", ()):
                yield "ConfigMap", source["configMapRef"], "name"
        for volume in pod["volumes"]:
            if "configMap" in volume:
                yield "ConfigMap", volume["configMap"], "name"
            if "persistentVolumeClaim" in volume:
                yield "PersistentVolumeClaim", volume["persistentVolumeClaim"], "claimName"


def selections(resource):
    """A resource's labels, and those by which it selects."""
    yield resource["metadata"].setdefault("labels", {})
    spec = resource.get("spec", {})
    if resource["kind"] == "Service":
        yield spec["selector"]
    elif "selector" in spec:
        yield spec["selector"]["matchLabels"]
    if "template" in spec:
        yield spec["template"]["metadata"]["labels"]
        for constraint in spec["template"]["spec"]["topologySpreadConstraints"]:
            yield constraint["labelSelector"]["matchLabels"]


def pods(resources):
    return [
        x["spec"] if x["kind"] == "Pod" else x["spec"]["template"]["spec"]
        for x in resources
        if x["kind"] in ("Pod", "Deployment")
    ]


def containers(resources):
    return [container for pod in pods(resources) for container in pod["containers"]]


def read_env(text):
    return dict(line.split("=", 1) for line in text.splitlines())


def of_kind(resources, kind):
    return {x["metadata"]["name"]: x for x in resources if x["kind"] == kind}


@pytest.fixture(scope="module", params=OVERLAYS)
def built(request):
    return request.param, json.loads(json.dumps(build(KUBERNETES / "overlays" / request.param)))  # no shared objects


@pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")
@pytest.mark.parametrize("folder", BUILT, ids=lambda folder: folder.name)
def test_kustomize_builds_the_same(folder):
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True)
    hashed = re.sub(r"((?:config|settings)[a-z-]*)-[a-z0-9]{10}$", r"\1", done.stdout, flags=re.MULTILINE)
    by_name = functools.partial(sorted, key=lambda x: (x["kind"], x["metadata"]["name"]))
    assert by_name(yaml.safe_load_all(hashed)) == by_name(build(folder))


# === Kubernetes ===


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.yaml")), ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_file_is_yaml(path):
    assert all(isinstance(document, dict) for document in yaml.safe_load_all(path.read_text()))


def test_every_manifest_is_used():
    built = {path for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml"}
    named = {
        path.parent / entry
        for path in KUBERNETES.rglob("kustomization.yaml")
        for entry in yaml.safe_load(path.read_text()).get("resources", ())
    }
    assert {path.resolve() for path in built} - {path.resolve() for path in named} == {
        KUBERNETES / "volume/writer.yaml"
    }


@pytest.mark.parametrize("version", ["1.33", kubernetes_validate.latest_version()])
def test_manifests_have_the_schema(version):
    writer = yaml.safe_load((KUBERNETES / "volume" / "writer.yaml").read_text())
    for resource in [resource for folder in BUILT for resource in build(folder)] + [writer]:
        kubernetes_validate.validate(resource, version, strict=True)


def test_names_are_unique_and_references_meet(built):
    resources = built[1]
    names = [(x["kind"], x["metadata"]["name"]) for x in resources]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[a-z0-9]([-a-z0-9]*[a-z0-9])?", name) for _, name in names)
    found = [(kind, holder[key]) for resource in resources for kind, holder, key in references(resource)]
    assert found and set(found) <= set(names)
    for pod in pods(resources):
        for container in pod["containers"]:
            assert {x["name"] for x in container["volumeMounts"]} == {x["name"] for x in pod["volumes"]}


def test_each_server_is_selected_once(built):
    resources = built[1]
    deployments = of_kind(resources, "Deployment")
    servers = ["serving"] if built[0] != "split" else [f"serving-{name.replace('_', '-')}" for name in PIPELINE]
    assert sorted(deployments) == sorted(servers)
    assert [*of_kind(resources, "PersistentVolumeClaim")] == ["models"]
    for kind in ("Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"):
        assert sorted(of_kind(resources, kind)) == sorted(servers)
    for name, deployment in deployments.items():
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        selectors = {
            other: x["spec"]["selector"] if x["kind"] == "Service" else x["spec"]["selector"]["matchLabels"]
            for kind in ("Deployment", "Service", "PodDisruptionBudget")
            for other, x in of_kind(resources, kind).items()
        }
        assert [other for other, wanted in selectors.items() if wanted.items() <= labels.items()] == [name]
        assert of_kind(resources, "HorizontalPodAutoscaler")[name]["spec"]["scaleTargetRef"]["name"] == name
        assert "replicas" not in deployment["spec"]  # or every `apply` would undo the autoscaler


def test_ports_probes_and_metrics_agree(built):
    for name, deployment in of_kind(built[1], "Deployment").items():
        (server,) = deployment["spec"]["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in server["ports"]}
        flags = expand(flags_of(server["args"]), settings_of(built[1], server))
        assert (
            ports == {"grpc": int(flags["port"]), "http": int(flags["rest_api_port"])} == {"grpc": GRPC, "http": REST}
        )
        service = of_kind(built[1], "Service")[name]["spec"]["ports"]
        assert {port["name"]: (port["port"], port["targetPort"]) for port in service} == {
            "grpc": (GRPC, "grpc"),
            "http": (REST, "http"),
        }
        model = flags["model_name"]
        for probe in ("startupProbe", "readinessProbe"):
            assert server[probe]["httpGet"] == {"path": f"/v1/models/{model}", "port": "http"}
        assert server["livenessProbe"]["tcpSocket"]["port"] == "grpc"
        annotations = deployment["spec"]["template"]["metadata"]["annotations"]
        assert annotations["prometheus.io/path"] == monitoring_path()
        assert annotations["prometheus.io/port"] == str(REST)


def test_pods_end_gracefully(built):
    for deployment in of_kind(built[1], "Deployment").values():
        pod = deployment["spec"]["template"]["spec"]
        (server,) = pod["containers"]
        command, seconds = server["lifecycle"]["preStop"]["exec"]["command"]
        age = int(settings_of(built[1], server)["GRPC_MAX_CONNECTION_AGE_MS"]) / 1000
        # gRPC lets a connection's age vary by 10 %
        assert command == "sleep" and age * 1.1 < int(seconds) < pod["terminationGracePeriodSeconds"]
        assert pod["shareProcessNamespace"] is True
        assert server["command"] == ["tensorflow_model_server"]
        assert server["readinessProbe"] and deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_models_are_mounted_read_only(built):
    for pod in pods(built[1]):
        volume = next(x for x in pod["volumes"] if "persistentVolumeClaim" in x)
        mount = next(x for x in pod["containers"][0]["volumeMounts"] if x["name"] == volume["name"])
        assert volume["persistentVolumeClaim"]["readOnly"] and mount["readOnly"]
        assert mount["mountPath"] == "/models"


def test_gpus_go_to_the_u_net(built):
    with_gpu = {
        name
        for name, x in of_kind(built[1], "Deployment").items()
        if "nvidia.com/gpu" in x["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    }
    assert with_gpu == {"cpu": set(), "gpu": {"serving"}, "split": {"serving-diffusion-model"}}[built[0]]
    for name, deployment in of_kind(built[1], "Deployment").items():
        image = deployment["spec"]["template"]["spec"]["containers"][0]["image"]
        assert image == f"tensorflow/serving:{server_version()}{'-gpu' * (name in with_gpu)}"
        (metric,) = of_kind(built[1], "HorizontalPodAutoscaler")[name]["spec"]["metrics"]
        assert metric["type"] == ("Pods" if name in with_gpu else "Resource")


def test_servers_get_the_models_of_their_shape(built):
    for name, deployment in of_kind(built[1], "Deployment").items():
        (server,) = deployment["spec"]["template"]["spec"]["containers"]
        flags = expand(flags_of(server["args"]), settings_of(built[1], server))
        if built[0] == "split":
            model = name.removeprefix("serving-").replace("-", "_")
            assert (flags["model_name"], flags["model_base_path"]) == (model, f"/models/{model}")
            assert flags["model_config_file"] == "" and model in NAMES
        else:
            assert flags["model_config_file"] == "/config/models.config"
            assert flags["model_name"] in DEFAULT


# === Settings ===


def flags_of(arguments):
    return dict(argument.removeprefix("--").split("=", 1) for argument in arguments)


def expand(flags, settings):
    return {name: re.sub(r"\$\((\w+)\)", lambda x: settings[x[1]], value) for name, value in flags.items()}


def settings_of(resources, container):
    (source,) = container["envFrom"]
    return of_kind(resources, "ConfigMap")[source["configMapRef"]["name"]]["data"]


def monitoring_path():
    """Its message, tensorflow.serving.MonitoringConfig, is not among those of tensorflow-serving-api."""
    text = (DEPLOY / "config" / "monitoring.config").read_text()
    return re.fullmatch(r'prometheus_config \{\s+enable: true\s+path: "(/[\w/]+)"\s+\}\s+', text)[1]


def server_version():
    """Of the image: the minor version of TensorFlow that exports."""
    version = dockerfile().build_args["VERSION"]
    assert f"tensorflow>={version.rpartition('.')[0]},<" in (ROOT / "requirements.txt").read_text()
    return version


def test_configuration_is_what_export_writes(tmp_path):
    for name in DEFAULT:
        (tmp_path / name / "1").mkdir(parents=True)
    write_config(tmp_path, "/models")
    for file in ("models.config", "batching.config"):
        assert (DEPLOY / "config" / file).read_text() == (tmp_path / file).read_text()


def test_models_config_names_the_exported_models():
    text = (DEPLOY / "config" / "models.config").read_text()
    config = text_format.Parse(text, model_server_config_pb2.ModelServerConfig()).model_config_list.config
    assert [(x.name, x.base_path) for x in config] == [(name, f"/models/{name}") for name in DEFAULT]
    assert set(PIPELINE) <= set(DEFAULT) <= set(NAMES)


# === Docker ===


def dockerfile(**build_args):
    parser = DockerfileParser(fileobj=(DEPLOY / "Dockerfile").open("rb"))
    parser.build_args = {
        name: value.strip('"')
        for x in parser.structure
        if x["instruction"] == "ARG"
        for name, value in [x["value"].split("=")]
    } | build_args
    return parser


def instruction(name):
    (found,) = [x["value"] for x in dockerfile().structure if x["instruction"] == name]
    return found


def run_entrypoint(tmp_path, *arguments, **environment):
    """The flags with which the image starts the server."""
    stub = tmp_path / "tensorflow_model_server"
    stub.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        [*json.loads(instruction("ENTRYPOINT")), *arguments],
        env={**dockerfile().envs, **environment, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return flags_of(done.stdout.splitlines())


@pytest.mark.parametrize("device", ["", "-gpu"])
def test_image_is_the_official_one(device):
    image = dockerfile(DEVICE=device)
    assert image.parent_images == [f"tensorflow/serving:{server_version()}{device}"]
    instructions = [x["instruction"] for x in image.structure if x["instruction"] != "COMMENT"]
    assert [x for x in instructions if x == "COPY"] == ["COPY"] and instruction("COPY") == "config /config"
    assert instruction("EXPOSE").split() == [str(GRPC), str(REST)]


def test_image_and_pods_start_the_same_server(tmp_path):
    settings = read_env((DEPLOY / "config" / "serving.env").read_text())
    assert dockerfile().envs == settings
    (server,) = containers(build(KUBERNETES / "base"))
    flags = run_entrypoint(tmp_path)
    assert flags == expand(flags_of(server["args"]), settings)
    assert set(flags) <= SERVER_FLAGS
    # each setting is read
    assert set(re.findall(r"\$\((\w+)\)", " ".join(server["args"]))) == set(settings)


def test_image_takes_further_flags_and_settings(tmp_path):
    flags = run_entrypoint(tmp_path, "--enable_profiler=true", MODEL_NAME="decoder", MODEL_CONFIG_FILE="")
    assert flags["enable_profiler"] == "true"
    assert flags["model_base_path"] == "/models/decoder" and flags["model_config_file"] == ""


@pytest.mark.parametrize(
    "status, state, healthy",
    [(200, "AVAILABLE", True), (200, "LOADING", False), (404, "", False), (None, "", False)],
)
def test_health_check(status, state, healthy):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps({"model_version_status": [{"version": "1", "state": state}]}).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    command = json.loads(instruction("HEALTHCHECK").partition(" CMD ")[2])
    assert f"/127.0.0.1/{REST} " in command[-1]
    command[-1] = command[-1].replace(str(REST), str(server.server_port))
    if status is None:
        server.shutdown()
        server.server_close()
    done = subprocess.run(command, env={**os.environ, "MODEL_NAME": "decoder"}, capture_output=True, timeout=20)
    server.shutdown()
    server.server_close()
    assert (done.returncode == 0) == healthy
    assert asked == ["/v1/models/decoder"] * (status is not None)


# === Compose ===


def compose(**environment):
    """compose.yaml with its variables put in."""

    def value(match):
        given = environment.get(match["name"], "")
        if match["operator"] == ":+":
            return match["word"] if given else ""
        return given or match["word"]

    def fill(node):
        if isinstance(node, dict):
            return {key: fill(child) for key, child in node.items()}
        if isinstance(node, list):
            return [fill(child) for child in node]
        return re.sub(variable, value, node) if isinstance(node, str) else node

    text = (DEPLOY / "compose.yaml").read_text()
    variable = r"\$\{(?P<name>\w+)(?P<operator>:[-+])(?P<word>[^}]*)\}"
    assert text.count("$") == len(re.findall(variable, text))
    return fill(yaml.safe_load(text))


@pytest.mark.parametrize("environment", [{}, {"GPU": "1", "FLAGS": "--enable_profiler=true", "ADDRESS": "0.0.0.0"}])
def test_compose_has_the_schema(environment):
    schemas = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor"
    schema = json.loads((schemas / "compose-spec.json").read_text())
    jsonschema.validators.validator_for(schema)(schema).validate(compose(**environment))


def test_compose_services(tmp_path):
    services = compose()["services"]
    assert set(services) == {"serving", "denoiser", *PIPELINE} and set(services) - {"serving"} <= set(NAMES)
    assert "profiles" not in services["serving"]  # a plain `up` starts it alone
    settings, published = set(dockerfile().envs), []
    for name, service in services.items():
        assert set(service["environment"]) <= settings
        flags = run_entrypoint(tmp_path, **service["environment"])
        if name == "serving":
            assert flags["model_config_file"] == "/config/models.config"
        else:
            assert service["profiles"] == ["split"]
            assert flags["model_config_file"] == "" and flags["model_base_path"] == f"/models/{name}"
        (volume,) = service["volumes"]
        assert volume["target"] == "/models" and volume["read_only"] and volume["bind"]["create_host_path"] is False
        assert (DEPLOY / volume["source"]).resolve() == ROOT / "models"
        addresses, outside, inside = zip(*(port.split(":") for port in service["ports"]))
        assert set(addresses) == {"127.0.0.1"} and inside == (str(GRPC), str(REST))
        published += outside
    assert len(set(published)) == len(published)
    # one GPU may serve all three
    fractions = [services[name]["environment"]["PER_PROCESS_GPU_MEMORY_FRACTION"] for name in PIPELINE]
    assert 0.5 < sum(map(float, fractions)) <= 1.0


def test_compose_builds_the_image_for_a_device():
    for environment, device, runtime in (({}, "", ""), ({"GPU": "1"}, "-gpu", "nvidia")):
        for service in compose(**environment)["services"].values():
            arguments = service["build"]["args"]
            image = dockerfile(VERSION=arguments["VERSION"], DEVICE=arguments["DEVICE"])
            assert image.parent_images == [f"tensorflow/serving:{server_version()}{device}"]
            assert service["image"] == f"keras-sd-serving:{server_version()}{device}"
            assert service["runtime"] == runtime
            assert (DEPLOY / service["build"]["context"] / "Dockerfile").is_file()


def test_a_batching_server_hosts_the_denoiser_alone(tmp_path):
    service = compose()["services"]["denoiser"]
    member = build(KUBERNETES / "overlays" / "split" / "denoiser")
    (server,) = containers(member)
    in_cluster = expand(flags_of(server["args"]), settings_of(member, server))
    for flags in (run_entrypoint(tmp_path, **service["environment"]), in_cluster):
        assert flags["model_base_path"] == "/models/denoiser" and flags["model_config_file"] == ""
        assert flags["enable_batching"] == "true"
        assert (DEPLOY / flags["batching_parameters_file"].lstrip("/")).is_file()
    for overlay in OVERLAYS:  # the server does not start with parameters and no batching
        for settings in of_kind(build(KUBERNETES / "overlays" / overlay), "ConfigMap").values():
            if "ENABLE_BATCHING" in settings["data"]:
                assert settings["data"]["ENABLE_BATCHING"] == "false"
                assert settings["data"]["BATCHING_PARAMETERS_FILE"] == ""


# === The page ===


def test_page_names_what_there_is():
    page = (DEPLOY / "README.md").read_text()
    shell = re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)
    assert shell
    flags = set(re.findall(r"--(\w+)=", page)) | set(re.findall(r"`--(\w+_\w+)", page))
    assert {flag for flag in flags if "_" in flag} <= SERVER_FLAGS
    for path in re.findall(r"serving/deploy/[\w./]+", page):
        assert (ROOT / path.rstrip(".")).exists(), path
    variables = set(re.findall(r"\b[A-Z]+_[A-Z_]+\b", page))
    text = (DEPLOY / "compose.yaml").read_text() + (DEPLOY / "config" / "serving.env").read_text()
    assert {name for name in variables if name not in text} <= {"DCGM_FI_DEV_GPU_UTIL"}


def test_memory_on_the_page_adds_up():
    page = (DEPLOY / "README.md").read_text()
    table = re.findall(r"^\| (.+?) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|", page, flags=re.MULTILINE)
    count = {name.strip("`").split("`")[0]: int(number.replace(",", "")) for name, number, *_ in table}
    for _, number, float32, half in table:
        weights = int(number.replace(",", "")) * 4 / 1e9
        assert (float32, half) == (f"{weights:.2f}", f"{weights / 2:.2f}")
    assert set(count) == {*DEFAULT, "all five"}
    assert count["stable_diffusion"] == sum(count[name] for name in PIPELINE)
    assert count["all five"] == sum(count[name] for name in DEFAULT)


def test_commands_of_the_page_parse():
    page = (DEPLOY / "README.md").read_text()
    commands = re.findall(r"^python -m (export|serving) (.*)$", page, flags=re.MULTILINE)
    assert {module for module, _ in commands} == {"export", "serving"}
    for module, arguments in commands:
        words = shlex.split(arguments, comments=True)
        (build_export_parser() if module == "export" else build_serving_parser()).parse_args(words)
