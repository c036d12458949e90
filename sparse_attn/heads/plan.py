# SPDX-License-Identifier: Apache-2.0
"""HeadPlan: a pattern for every layer and head of one model, as a file."""

from __future__ import annotations

import hashlib
import importlib.resources
import itertools
import json
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_attn.heads.described import describe, pattern_schema, pattern_types, undescribe
from sparse_attn.patterns import Pattern, PerHead

if TYPE_CHECKING:
    from sparse_attn.integrations.transformers import Handle

SCHEMA = "sparse_attn/head_plan/1"
"""What `schema` says in a file of this version."""
SCHEMA_FILE = "head_plan.schema.json"

_NUMBERS = itertools.count()
_HASHED = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def config_hash(model: Any) -> str:
    """A hash of the sizes that say which weights fit: what neither dtype nor version changes.

    Args:
        model: a transformers model or config.
    """
    config = text_config(model)
    sizes = {name: getattr(config, name, None) for name in _HASHED}
    heads = sizes["num_attention_heads"]
    sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or heads
    sizes["head_dim"] = sizes["head_dim"] or (sizes["hidden_size"] or 0) // (heads or 1)
    text = json.dumps(sizes, sort_keys=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:32]


def text_config(model: Any) -> Any:
    """The config of a model's language part; `model` may be a config itself."""
    config = getattr(model, "config", model)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@dataclass(frozen=True)
class PlannedHead:
    """What one query head does, and what was measured of it.

    Attributes:
        pattern: which keys it sees.
        recall: share of the softmax mass on these keys, mean over rows, in [0, 1]; None: unknown.
        milliseconds: of its selection and attention, under the plan's `measured` conditions.
    """

    pattern: Pattern
    recall: float | None = None
    milliseconds: float | None = None


@dataclass(frozen=True)
class HeadPlan:
    """A pattern per layer and query head of a model.

    ``plan.enable(model)`` lets a transformers model use it. Called with the number of a layer it
    gives that layer's pattern, so that it can be passed wherever a pattern per layer is taken.

    Attributes:
        layers: the heads of each layer.
        num_heads_kv: KV heads of a layer; query head h reads KV head h // (heads / num_heads_kv).
        model_id: which model it is for, in words.
        config_hash: `config_hash` of its config; None: not known, any model of these heads may use
            it.
        created_by: what made it.
        measured: the conditions of `recall` and `milliseconds` (tokens, threads, ...), and what
            the whole plan measured.

    Raises:
        TypeError: a head is not a `PlannedHead`, or has a PerHead as its pattern.
        ValueError: there is no layer or head, or layers differ in their heads.

    Example:
        >>> from sparse_attn.patterns import AShape, Dense
        >>> layer = [PlannedHead(Dense()), PlannedHead(AShape(sink=4, window=256))]
        >>> plan = HeadPlan([layer, layer], num_heads_kv=1)
        >>> plan(1).pattern_of(0)
        Dense()
        >>> HeadPlan.from_dict(plan.to_dict()) == plan
        True
    """

    layers: tuple[tuple[PlannedHead, ...], ...]
    num_heads_kv: int
    model_id: str = "unknown"
    config_hash: str | None = None
    created_by: str = ""
    measured: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(tuple(layer) for layer in self.layers))
        if not self.layers or not self.layers[0]:
            raise ValueError("sparse_attn.HeadPlan: no heads given; pass a PlannedHead for each.")
        for number, layer in enumerate(self.layers):
            if len(layer) != self.num_heads:
                raise ValueError(
                    f"sparse_attn.HeadPlan: layer {number} has {len(layer)} heads, layer 0 "
                    f"{self.num_heads}; all layers need the same."
                )
            for head, planned in enumerate(layer):
                _check_head(f"layer {number}, head {head}", planned)
        if self.num_heads_kv < 1 or self.num_heads % self.num_heads_kv:
            raise ValueError(
                f"sparse_attn.HeadPlan: num_heads_kv={self.num_heads_kv} does not divide the "
                f"{self.num_heads} query heads of a layer."
            )

    # ---------------------------------------------------------------- use

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        """Query heads of a layer."""
        return len(self.layers[0])

    def __call__(self, layer: int | None) -> Pattern:
        """The pattern of one layer: what its heads agree on, else a `PerHead`.

        Args:
            layer: its number, from 0.

        Raises:
            ValueError: the plan has no such layer.
        """
        if layer is None or not 0 <= layer < self.num_layers:
            raise ValueError(
                f"sparse_attn.HeadPlan: layer {layer} is asked for, the plan ({self.model_id}) has "
                f"layers 0 to {self.num_layers - 1}; use a plan that was made for this model."
            )
        patterns = [planned.pattern for planned in self.layers[layer]]
        if all(pattern == patterns[0] for pattern in patterns):
            return patterns[0]
        return PerHead(patterns)

    def check_model(self, model: Any) -> HeadPlan:
        """Returns self, if it fits.

        Args:
            model: a transformers model or config.

        Raises:
            ValueError: layers, heads or the config's hash differ.
        """
        config = text_config(model)
        found = {
            "num_layers": config.num_hidden_layers,
            "num_heads": config.num_attention_heads,
            "num_heads_kv": getattr(config, "num_key_value_heads", None)
            or config.num_attention_heads,
        }
        for name, value in found.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"sparse_attn.HeadPlan: {name}={getattr(self, name)} in the plan "
                    f"({self.model_id}), the model has {value}; use a plan made for it."
                )
        if self.config_hash is not None and self.config_hash != config_hash(config):
            raise ValueError(
                f"sparse_attn.HeadPlan: the plan is for {self.model_id} (config "
                f"{self.config_hash}), the model's config is {config_hash(config)}; calibrate one "
                "for it, or drop config_hash if you know that it fits."
            )
        return self

    def enable(self, model: Any, *, decode: Any = "dense") -> Handle:
        """Lets a transformers model attend by this plan, until the handle is disabled.

        Two models may have two plans at once.

        Args:
            model: whose attention implementation is set.
            decode: what passes of a few rows see; see `integrations.transformers.enable`.

        Returns:
            A handle; ``disable()`` it, or use it in a ``with`` statement, and the model has the
            implementation that it had.

        Raises:
            ImportError: transformers is missing.
            ValueError: the plan does not fit the model.
        """
        from sparse_attn.integrations.transformers import enable

        self.check_model(model)
        before = model.config._attn_implementation
        handle = enable(self, decode=decode, name=f"sparse_attn_plan_{next(_NUMBERS)}")
        model.set_attn_implementation(handle.name)
        handle._undo.append(lambda: model.set_attn_implementation(before))
        return handle

    def counts(self) -> dict[str, int]:
        """How many heads have each pattern (its text), most first."""
        patterns = Counter(repr(head.pattern) for layer in self.layers for head in layer)
        return dict(patterns.most_common())

    def __str__(self) -> str:
        lines = [
            f"{self.model_id}: {self.num_layers} layers, {self.num_heads} query heads, "
            f"{self.num_heads_kv} KV heads",
            *(f"{name:11s} {value}" for name, value in self.measured.items()),
        ]
        letters = {name: letter(n) for n, name in enumerate(self.counts())}
        lines += [f"{letters[name]} {count:5d} x {name}" for name, count in self.counts().items()]
        lines.append("layer  heads")
        for number, layer in enumerate(self.layers):
            marks = "".join(letters[repr(head.pattern)] for head in layer)
            recalls = [head.recall for head in layer if head.recall is not None]
            worst = f"  recall {min(recalls):.3f} or more" if recalls else ""
            lines.append(f"{number:5d}  {marks}{worst}")
        return "\n".join(lines)

    # ---------------------------------------------------------------- files

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        return {
            "schema": SCHEMA,
            "model": {
                "id": self.model_id,
                "config_hash": self.config_hash,
                "num_layers": self.num_layers,
                "num_heads": self.num_heads,
                "num_heads_kv": self.num_heads_kv,
            },
            "created_by": self.created_by,
            "measured": dict(self.measured),
            "layers": [
                {"heads": [_written(head, number, h) for h, head in enumerate(layer)]}
                for number, layer in enumerate(self.layers)
            ],
        }

    def to_json(self) -> str:
        """The text of its file: a line per head."""
        data = self.to_dict()
        layers = data.pop("layers")
        head = json.dumps(data, indent=1)[:-2]  # without the closing brace
        rows = [
            '  {"heads": [\n   ' + ",\n   ".join(map(json.dumps, layer["heads"])) + "\n  ]}"
            for layer in layers
        ]
        return f'{head},\n "layers": [\n' + ",\n".join(rows) + "\n ]\n}\n"

    def save(self, file: str | Path) -> None:
        """Writes the plan."""
        Path(file).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path) -> HeadPlan:
        """Reads what `save` wrote.

        Raises:
            OSError: there is no such file.
            ValueError: it is not a plan; the text names layer, head and what is allowed.
        """
        text = Path(file).read_text(encoding="utf-8")
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"sparse_attn.HeadPlan: {file}: not JSON: {error}.") from error
        return cls.from_dict(data, where=str(file))

    @classmethod
    def ready(cls, name: str) -> HeadPlan:
        """A plan that comes with the package.

        Args:
            name: one of `ready_plans()`.

        Raises:
            ValueError: there is no such plan.
        """
        if name not in ready_plans():
            raise ValueError(
                f"sparse_attn.HeadPlan.ready: {name!r} is unknown; there are "
                f"{', '.join(ready_plans())}. To make one: python -m sparse_attn calibrate."
            )
        text = (_package() / f"{name}.plan.json").read_text(encoding="utf-8")
        return cls.from_dict(json.loads(text), where=name)

    @classmethod
    def from_dict(cls, data: object, where: str = "plan") -> HeadPlan:
        """The plan that `to_dict` gave.

        Args:
            data: JSON's objects as dicts.
            where: the file's name, for errors.

        Raises:
            ValueError: it is not a plan; the text names layer, head and what is allowed.
        """
        plan = _entries(where, data, _PLAN_KEYS)
        if plan["schema"] != SCHEMA:
            raise _wrong(where, f"schema is {plan['schema']!r}; this version reads {SCHEMA!r}")
        model = _entries(f"{where}: model", plan["model"], _MODEL_KEYS)
        layers = []
        for number, layer in enumerate(plan["layers"]):
            at = f"{where}: layer {number}"
            heads = _entries(at, layer, {"heads": list})["heads"]
            if len(heads) != model["num_heads"]:
                raise _wrong(at, f"{len(heads)} heads; model.num_heads is {model['num_heads']}")
            layers.append([_read_head(f"{at}, head {n}", head) for n, head in enumerate(heads)])
        if len(layers) != model["num_layers"]:
            raise _wrong(where, f"{len(layers)} layers; model.num_layers is {model['num_layers']}")
        try:
            return cls(
                layers,  # type: ignore[arg-type]
                num_heads_kv=model["num_heads_kv"],
                model_id=model["id"],
                config_hash=model.get("config_hash"),
                created_by=plan.get("created_by", ""),
                measured=plan.get("measured", {}),
            )
        except (TypeError, ValueError) as error:
            raise _wrong(where, str(error).rstrip(".")) from error


def letter(number: int) -> str:
    """A mark for the n-th pattern of a plan: a to z, A to Z, then ?."""
    return string.ascii_letters[number] if number < len(string.ascii_letters) else "?"


def ready_plans() -> tuple[str, ...]:
    """Names of the plans that come with the package."""
    suffix = ".plan.json"
    files = (entry.name for entry in _package().iterdir())
    return tuple(sorted(name[: -len(suffix)] for name in files if name.endswith(suffix)))


def _package() -> Any:
    return importlib.resources.files("sparse_attn.heads")


def schema() -> dict[str, Any]:
    """The JSON Schema of a plan; head_plan.schema.json is its text."""
    count = {"type": "integer", "minimum": 1}
    head = {
        "type": "object",
        "properties": {
            "pattern": {"$ref": "#/$defs/pattern"},
            "recall": {"type": "number", "minimum": 0, "maximum": 1},
            "milliseconds": {"type": "number", "minimum": 0},
        },
        "required": ["pattern"],
        "additionalProperties": False,
    }
    model = {
        "id": {"type": "string"},
        "config_hash": {"type": ["string", "null"]},
        "num_layers": count,
        "num_heads": count,
        "num_heads_kv": count,
    }
    layer = {
        "type": "object",
        "properties": {"heads": {"type": "array", "items": head, "minItems": 1}},
        "required": ["heads"],
        "additionalProperties": False,
    }
    patterns, types = pattern_schema(), pattern_types()
    choices = [{"$ref": f"#/$defs/{name}"} for name in patterns if issubclass(types[name], Pattern)]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sparse_attn head plan",
        "type": "object",
        "properties": {
            "schema": {"const": SCHEMA},
            "model": {
                "type": "object",
                "properties": model,
                "required": [name for name in model if name != "config_hash"],
                "additionalProperties": False,
            },
            "created_by": {"type": "string"},
            "measured": {"type": "object"},
            "layers": {"type": "array", "items": layer, "minItems": 1},
        },
        "required": ["schema", "model", "layers"],
        "additionalProperties": False,
        "$defs": {"pattern": {"oneOf": choices}, **patterns},
    }


def write_schema() -> None:
    """Writes head_plan.schema.json into the package's folder, for developers of patterns."""
    file = Path(__file__).with_name(SCHEMA_FILE)
    file.write_text(json.dumps(schema(), indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------ checks

_PLAN_KEYS = {"schema": str, "model": dict, "layers": list, "created_by?": str, "measured?": dict}
_MODEL_KEYS = {
    "id": str,
    "num_layers": int,
    "num_heads": int,
    "num_heads_kv": int,
    "config_hash?": (str, type(None)),
}
_HEAD_KEYS = {"pattern": dict, "recall?": (int, float), "milliseconds?": (int, float)}


def _wrong(where: str, what: str) -> ValueError:
    return ValueError(f"sparse_attn.HeadPlan: {where}: {what}.")


def _entries(where: str, data: object, keys: Mapping[str, Any]) -> dict[str, Any]:
    """`data`, checked to be a dict of these keys and types; a name with ? may be missing."""
    if not isinstance(data, dict):
        raise _wrong(where, f"a {type(data).__name__} stands where an object belongs")
    allowed = {name.rstrip("?"): kinds for name, kinds in keys.items()}
    unknown = [name for name in data if name not in allowed]
    if unknown:
        raise _wrong(where, f"unknown {', '.join(unknown)}; allowed are {', '.join(allowed)}")
    missing = [name for name in keys if not name.endswith("?") and name not in data]
    if missing:
        raise _wrong(where, f"{', '.join(missing)} missing")
    for name, value in data.items():
        if isinstance(value, bool) or not isinstance(value, allowed[name]):
            kinds = allowed[name] if isinstance(allowed[name], tuple) else (allowed[name],)
            wanted = " or ".join(_JSON_NAMES[kind] for kind in kinds)
            raise _wrong(where, f"{name}={value!r:.60} is not {wanted}")
    return data


_JSON_NAMES: dict[type, str] = {
    str: "a string",
    dict: "an object",
    list: "an array",
    int: "an integer",
    float: "a number",
    type(None): "null",
}


def _read_head(where: str, data: object) -> PlannedHead:
    head = _entries(where, data, _HEAD_KEYS)
    if not 0 <= head.get("recall", 0) <= 1 or not head.get("milliseconds", 0) >= 0:
        raise _wrong(where, "recall must be in [0, 1] and milliseconds at least 0")
    try:
        pattern = undescribe(head["pattern"])
    except (TypeError, ValueError) as error:
        raise _wrong(where, f"pattern: {str(error).rstrip('.')}") from error
    return PlannedHead(pattern, head.get("recall"), head.get("milliseconds"))


def _check_head(where: str, planned: object) -> None:
    if not isinstance(planned, PlannedHead):
        raise TypeError(
            f"sparse_attn.HeadPlan: {where} is a {type(planned).__name__}; pass a PlannedHead."
        )
    if not isinstance(planned.pattern, Pattern) or isinstance(planned.pattern, PerHead):
        raise TypeError(
            f"sparse_attn.HeadPlan: {where} has a {type(planned.pattern).__name__} for its "
            "pattern; pass one Pattern, not a PerHead."
        )


def _written(planned: PlannedHead, layer: int, head: int) -> dict[str, Any]:
    try:
        data: dict[str, Any] = {"pattern": describe(planned.pattern)}
    except TypeError as error:
        raise TypeError(f"{error} (layer {layer}, head {head})") from error
    if planned.recall is not None:
        data["recall"] = round(planned.recall, 5)
    if planned.milliseconds is not None:
        data["milliseconds"] = round(planned.milliseconds, 3)
    return data


def planned(layers: Sequence[Sequence[Pattern]]) -> tuple[tuple[PlannedHead, ...], ...]:
    """Heads of which nothing was measured."""
    return tuple(tuple(PlannedHead(pattern) for pattern in layer) for layer in layers)
