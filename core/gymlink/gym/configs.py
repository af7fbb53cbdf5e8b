"""Asks Gym itself what a configuration means, before anything starts.

Gym's own parser reads the config files, in Gym's own interpreter, so a mistake comes back in Gym's own words within
seconds and no Ray was started for it. The answer is kept in the cache for as long as none of the files changes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gymlink.config import TokenIdsPath
from gymlink.errors import ConfigError
from gymlink.gym.guard import GuardedProcess
from gymlink.gym.install import (
    LAST_LINES,
    REPORT_EVERY_S,
    GymEnvironment,
    Report,
    ServerFolder,
    cache_folder,
    last_lines,
)

MODEL_CONFIGS: Mapping[TokenIdsPath, str] = {
    "gateway": "responses_api_models/vllm_model/configs/vllm_model.yaml",
    "messages": "responses_api_models/vllm_model/configs/vllm_model_for_training.yaml",
}
"""Gym's model server, without and with token ids on its messages; added when the configuration has no `policy_model` of
its own, and below one that only sets some of its fields."""
POLICY_KEY_VARIABLE = "GYMLINK_POLICY_API_KEY"
"""Where Gym's servers find the policy's key: never in a file, on a command line or in the head server's answers."""

_ANY_POLICY = ("++policy_base_url='http://127.0.0.1/v1'", "++policy_api_key=''", "++policy_model_name=policy")

# Run by Gym's interpreter with: where to answer, the config paths and the overrides, both as JSON, the model server.
_ASK_GYM = """
import json, sys
from pathlib import Path
from omegaconf import OmegaConf
from nemo_gym import PARENT_DIR
from nemo_gym.config_types import ConfigError
from nemo_gym.global_config import GlobalConfigDictParser, get_global_config_dict

answer, paths, overrides = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
model_config, policy, vllm_fields = sys.argv[4], "policy_model", "policy_model.responses_api_models.vllm_model."

def leaves(path, value):
    below = value.items() if isinstance(value, dict) else ()
    return [leaf for key, item in below for leaf in leaves(f"{path}.{key}", item)] or [path]

try:
    parser = GlobalConfigDictParser()
    files, documents = parser.load_extra_config_paths(paths)
    dotenv = next((path for path in (Path("env.yaml"), PARENT_DIR / "env.yaml") if path.exists()), None)
    if dotenv:
        documents.append(OmegaConf.load(dotenv))
    given = sorted({str(key) for document in documents for key in document})
    read = [OmegaConf.to_container(document, resolve=False) for document in documents]
    said = [leaf for document in read if policy in document for leaf in leaves(policy, document[policy])]
    said += [item.partition("=")[0][2:] for item in overrides if item.startswith(f"++{policy}.")]
    if all(leaf.startswith(vllm_fields) for leaf in said) and vllm_fields + "entrypoint" not in said:
        paths.insert(0, model_config)
    quoted = ",".join("'" + path.replace("'", chr(92) + "'") + "'" for path in paths)
    sys.argv = ["gym", "+config_paths=[" + quoted + "]", *overrides]
    config = get_global_config_dict()
    parser.raise_on_no_server_instances(config)
except ConfigError as error:
    sys.exit(str(error))
found = [next((p for p in (Path(file), PARENT_DIR / file) if p.exists()), Path(file)) for file in files]
answer.write_text(json.dumps({
    "config": OmegaConf.to_container(config, resolve=False),
    "config_paths": paths,
    "given": given,
    "files": [str(path.resolve()) for path in [*found, *([dotenv] if dotenv else [])]],
    "install": str(PARENT_DIR),
}))
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """What Gym will run.

    `servers` maps an instance's name to (kind, folder name); `config_paths` includes the model server; `given` are the
    top-level keys that the config files set; `pins` are the packages in which all servers must agree with Gym;
    `head_server` is its host and port; `install` is the folder in which Gym's own servers are.
    """

    servers: Mapping[str, Sequence[str]]
    config_paths: Sequence[str]
    given: Sequence[str]
    pins: Sequence[str]
    head_server: Mapping[str, Any]
    install: str

    def folders(self, cwd: Path) -> list[ServerFolder]:
        """The folder of each server, once: the user's own where there is one, else Gym's, as Gym itself looks."""
        folders = []
        for kind, name in dict.fromkeys((kind, name) for kind, name in self.servers.values()):
            own = cwd / kind / name
            is_own = any((own / file).exists() for file in ("requirements.txt", "pyproject.toml"))
            folders.append(ServerFolder(kind, name, own.resolve() if is_own else Path(self.install, kind, name)))
        return folders


def plan(
    gym: GymEnvironment,
    config_paths: Sequence[str],
    overrides: Sequence[str],
    *,
    token_ids: TokenIdsPath,
    root: Path,
    cwd: Path,
    env: Mapping[str, str],
    report: Report,
) -> Plan:
    """Let Gym read the configuration. Where the policy is has no part in it.

    Args:
        gym: the Gym to ask.
        config_paths: as in the settings.
        overrides: the settings' own, in Hydra's form (`hydra_override`).
        token_ids: says which of Gym's model servers is added.
        root: the user's folder, of which `cwd` holds links.
        cwd: the folder that relative paths refer to first, then Gym's install.
        env: the environment for Gym.
        report: told that Gym is being asked.

    Raises:
        ConfigError: Gym refuses it, in Gym's own words.
    """
    question = json.dumps([str(gym.prefix), gym.version, str(root), [*config_paths], [*overrides], token_ids])
    kept = cache_folder() / "plans" / f"{hashlib.sha256(question.encode()).hexdigest()[:16]}.json"
    if (known := _read_kept(kept)) is not None:
        return known
    answer = _ask(gym, config_paths, overrides, MODEL_CONFIGS[token_ids], root=root, cwd=cwd, env=env, report=report)
    config = answer["config"]
    found = Plan(
        servers={name: (kind, folder) for name, kind, folder, _ in server_instances(config)},
        config_paths=answer["config_paths"],
        given=answer["given"],
        pins=config.get("head_server_deps", []),
        head_server=config["head_server"],
        install=answer["install"],
    )
    contents = {path: _content(path) for path in [*answer["files"], str(root / "env.yaml")]}
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"plan": asdict(found), "contents": contents}), encoding="utf-8")
    return found


def server_instances(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    """(name, kind, folder name, its settings) of each server in a whole Gym config, as Gym itself finds them."""
    for name, by_kind in config.items():
        if not isinstance(by_kind, Mapping) or not by_kind:
            continue
        kind, by_folder = next(iter(by_kind.items()))
        if not isinstance(by_folder, Mapping) or not by_folder:
            continue
        folder, settings = next(iter(by_folder.items()))
        if isinstance(settings, Mapping) and "entrypoint" in settings:
            yield name, kind, folder, settings


def _ask(
    gym: GymEnvironment,
    config_paths: Sequence[str],
    overrides: Sequence[str],
    model_config: str,
    *,
    root: Path,
    cwd: Path,
    env: Mapping[str, str],
    report: Report,
) -> dict[str, Any]:
    answer, log = cwd / "answer.json", cwd / "answer.log"
    question = [str(answer), json.dumps([*config_paths]), json.dumps([*_ANY_POLICY, *overrides]), model_config]
    started = time.monotonic()
    with log.open("wb") as output:
        # -P as for the console script: the working directory must not shadow Gym's packages.
        process = GuardedProcess([str(gym.python), "-P", "-c", _ASK_GYM, *question], env=env, cwd=cwd, output=output)
        try:
            report("reading the configuration")
            while (status := process.wait(REPORT_EVERY_S)) is None:
                report(f"reading the configuration ({time.monotonic() - started:.0f} s)")
        finally:
            process.stop()
    if status != 0:
        said, _, _ = last_lines(log, 200).partition("Found global config dict yaml:")
        lines = said.strip().splitlines()[-LAST_LINES:]
        # Gym looks into a private folder with links to the user's own: name that one.
        raise ConfigError("Gym refuses this configuration:\n" + "\n".join(lines).replace(str(cwd), str(root)))
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def _read_kept(path: Path) -> Plan | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_current = all(_content(file) == digest for file, digest in kept["contents"].items())
    return Plan(**kept["plan"]) if is_current else None


def _content(path: str) -> str | None:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return None
