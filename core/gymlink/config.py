"""`gym.yaml`: the one file that every trainer reads, checked whole before anything starts.

Paths in the file are relative to the file's own folder. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from gymlink.errors import ConfigError

DEFAULT_GYM_VERSION = "0.4.0"
"""The newest NeMo Gym that runs on Python 3.12."""

TokenIdsPath = Literal["gateway", "messages"]
"""How the ids of what was sampled reach the trainer: from the gateway alone, or also on Gym's messages."""


S = TypeVar("S", bound="PolicySettings")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _http_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError("write the whole address, such as http://127.0.0.1:11000")
    return url.rstrip("/")


class GymSettings(_Section):
    """Which environments to run, and on which Gym.

    Either gymlink starts Gym from `config_paths`, or it attaches to one that runs already (`head_server`), which it
    then never stops.
    """

    config_paths: tuple[str, ...] = ()
    """Gym config files: relative to this file's folder, else to Gym's own install. The model server is added."""
    version: str = DEFAULT_GYM_VERSION
    """The nemo-gym to install into a separate environment."""
    python: str | None = None
    """The interpreter for that environment: a path, or a version such as "3.12". Found by itself when not given."""
    venv: Path | None = None
    """An environment of your own in which nemo-gym is installed already."""
    head_server: Annotated[str, AfterValidator(_http_url)] | None = None
    """Attach to the Gym whose head server answers here."""
    root: Path | None = None
    """The folder that holds resources_servers/ and the like of your own; this file's folder when not given."""
    overrides: Mapping[str, Any] = Field(default_factory=dict)
    """Gym settings by dotted path, as after `++` on Gym's command line."""
    start_timeout_s: float = Field(900.0, gt=0)

    @model_validator(mode="after")
    def _start_or_attach(self) -> GymSettings:
        if self.head_server is None and not self.config_paths:
            raise ValueError("give config_paths to start Gym, or head_server to attach to one that runs")
        if self.head_server is not None and self.config_paths:
            raise ValueError("give config_paths or head_server, not both: an attached Gym is already configured")
        return self


class RolloutSettings(_Section):
    concurrency: int = Field(128, ge=1)
    """Rollouts in flight at a time, in each process."""
    deadline_s: float = Field(600.0, gt=0)
    """A rollout that has no result by then has failed (kind "timeout")."""
    attempts: int = Field(1, ge=1)
    """How often a rollout is tried before it counts as failed."""
    max_failed_fraction: float = Field(0.5, ge=0.0, le=1.0)
    """A batch of which more than this share failed stops the run."""
    record: Literal["full", "text", "off"] = "full"
    """What `rollouts.jsonl` holds of each rollout: all (ids, masks and logprobs too), what a person reads, nothing."""


class AlignmentSettings(_Section):
    on_history_rewrite: Literal["fork", "last", "mask"] = "fork"
    """What is trained of a rollout whose history was rewritten: every branch, the one that ends in the final
    response, or none. What is left out is counted."""
    reasoning: Literal["keep", "drop"] = "keep"
    """Earlier reasoning stays as sampled (keep), or leaves as the model's template has it, at a fork (drop)."""
    format: str | None = None
    """The chat format by its name in `renderers`; by default the tokenizer's own template decides."""


class GatewaySettings(_Section):
    host: str = "127.0.0.1"
    port: int = Field(0, ge=0, le=65535)
    """0 takes a free port."""
    advertise_host: str | None = None
    """The name under which Gym's servers reach this machine, when it is not `host`."""
    token_ids: TokenIdsPath = "gateway"  # noqa: S105 - no secret
    """Token ids stay at the gateway (gateway), or travel through Gym on its messages too (messages), which also trains
    agents that drop a rollout's id from their calls. It is about the model server that gymlink adds: a `policy_model`
    in your own config files stays as it is."""
    pause_hold_s: float = Field(30.0, ge=0)
    """How long a call waits at a paused gateway before it is answered 429. NeMo Gym 0.4 tries again without end, 0.7
    three times: there it has to be more than a third of the longest pause."""

    @property
    def ids_travel(self) -> bool:
        """Whether token ids go through Gym, so that a rollout whose calls do not name it is known by them."""
        return self.token_ids == "messages"  # noqa: S105 - no secret


class PolicySettings(_Section):
    """What a gateway needs where no Gym runs: `gym.yaml` without `gym`."""

    rollout: RolloutSettings = RolloutSettings()
    alignment: AlignmentSettings = AlignmentSettings()
    gateway: GatewaySettings = GatewaySettings()


class Settings(PolicySettings):
    """The whole of `gym.yaml`."""

    gym: GymSettings


def load_settings(path: str | Path) -> Settings:
    """Read and check a `gym.yaml`.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds a key or value that cannot work. All problems are
            listed at once.
    """
    path = Path(path)
    return parse_settings(_read(path), where=str(path), folder=path.resolve().parent)


def load_policy_settings(path: str | Path) -> PolicySettings:
    """Read and check a `gym.yaml` that may leave out `gym`; `Settings` when it does not. Raises as `load_settings`."""
    data = _read(Path(path))
    if isinstance(data, Mapping) and "gym" in data:
        return load_settings(path)
    return _validate(PolicySettings, data or {}, str(path))


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Cannot read the settings file {str(path)!r}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The settings file {str(path)!r} is not UTF-8 text: {error}.") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def parse_settings(data: Any, *, where: str = "settings", folder: Path | None = None) -> Settings:
    """Check settings that are already in memory; paths are taken relative to `folder` (the working directory)."""
    settings = _validate(Settings, data, where)
    return settings.model_copy(update={"gym": _resolved(settings.gym, folder or Path.cwd())})


def _validate(model: type[S], data: Any, where: str) -> S:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected a mapping with the key 'gym', got {type(data).__name__}.")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_explain(error))) from error


def _resolved(gym: GymSettings, folder: Path) -> GymSettings:
    def local(path: Path) -> Path:
        return path if path.is_absolute() else folder / path

    def config_path(path: str) -> str:
        here = local(Path(path).expanduser())
        return str(here) if here.exists() else path

    return gym.model_copy(
        update={
            "config_paths": tuple(config_path(path) for path in gym.config_paths),
            "root": local((gym.root or folder).expanduser()),
            "venv": local(gym.venv.expanduser()) if gym.venv else None,
        }
    )


def _explain(error: ValidationError) -> Iterable[str]:
    for problem in sorted(error.errors(), key=lambda problem: [str(part) for part in problem["loc"]]):
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _known_keys(problem["loc"][:-1])
            nearest = get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}"
            yield f"unknown key {where!r} ({hint})"
        elif problem["type"] == "missing":
            yield f"the key {where!r} is missing"
        elif problem["type"] in _WANTED:
            yield f"{where}: {_WANTED[problem['type']]} is needed (got {problem['input']!r})"
        else:
            given = problem["input"]
            shown = f" (got {given!r})" if where and not isinstance(given, Mapping) else ""
            yield f"{where or 'settings'}: {problem['msg'].removeprefix('Value error, ')}{shown}"


_WANTED = {"tuple_type": "a list", "model_type": "a mapping", "dict_type": "a mapping", "string_type": "a text"}


def _known_keys(section: tuple[int | str, ...]) -> list[str]:
    model: Any = Settings
    for part in section:
        model = model.model_fields[part].annotation
    return list(model.model_fields)
