"""Which methods there are. Imported while the configuration is checked: torch is not.

To add one: a file that declares a `Method`, and its name in `METHODS`. The first of a family is its default.
"""

from __future__ import annotations

from collections.abc import Iterable

from ml_collections import ConfigDict, FrozenConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.methods import (
    adjoint_matching,
    anchored,
    draft,
    drtune,
    fdfo,
    flowbp,
    forward_process,
    grpo,
    leapalign,
    refl,
)
from flow_grpo.methods.base import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        grpo.METHOD,
        *forward_process.METHODS,
        fdfo.METHOD,
        drtune.METHOD,
        flowbp.SPARSE,
        flowbp.LAGRANGE,
        refl.METHOD,
        draft.DRAFT_K,
        draft.DRAFT_LV,
        draft.ALIGNPROP,
        leapalign.METHOD,
        anchored.METHOD,
        adjoint_matching.METHOD,
    )
}


def black_box(config: ConfigDict | FrozenConfigDict) -> Method:
    """The method that `train.method` names among those that look at rewards alone; empty: the first, GRPO."""
    return _member(config, reward_gradient=False)


def reward_gradient(config: ConfigDict | FrozenConfigDict) -> Method:
    """The method that `train.method` names among those that take the reward's gradient; empty: the first, DRTune."""
    return _member(config, reward_gradient=True)


def method_of(config: ConfigDict | FrozenConfigDict) -> Method:
    """The method that a configuration trains by."""
    return _member(config, config.use_reward_gradient)


def _member(config: ConfigDict | FrozenConfigDict, reward_gradient: bool) -> Method:
    family = {name: method for name, method in METHODS.items() if method.reward_gradient == reward_gradient}
    name = config.train.method or next(iter(family))
    if name in family:
        return family[name]
    known = "is of the other family" if name in METHODS else "is not a method"
    raise ConfigError(
        f"config.train.method = {name!r} {known}; with config.use_reward_gradient = {reward_gradient} it takes "
        f"{_either(family)}."
    )


def check_method(config: ConfigDict | FrozenConfigDict) -> None:
    """ConfigError for a method of the other family, for settings that only others read, and for what cannot be."""
    method = method_of(config)
    own = {key.name for key in method.keys}
    others = {key.name: key.default for other in METHODS.values() for key in other.keys if key.name not in own}
    for key, allowed in {**others, **method.only}.items():
        if _value(config, key) != allowed:
            raise ConfigError(
                f"config.{key} = {_value(config, key)!r} is for config.train.method = {_either(readers(key))}; "
                f"with {method.name!r} it takes {allowed!r}."
            )
    method.check(config)


def readers(key: str) -> list[str]:
    """Names of the methods that look at a setting."""
    owners = [method for method in METHODS.values() if key in [own.name for own in method.keys]]
    return [method.name for method in owners or METHODS.values() if not (_is_unread(method, key) or key in method.only)]


def _is_unread(method: Method, key: str) -> bool:
    groups = tuple(name for name in method.unread if name.endswith("."))
    return key in method.unread or key.startswith(groups)


def _either(names: Iterable[str]) -> str:
    return " or ".join(map(repr, names))


# Keys that nothing looks at while another has one of these values: (key, the other, the values).
MOOT: tuple[tuple[str, str, tuple[object, ...]], ...] = (
    ("train.ratio_probes", "train.ratio", ("sde",)),
    ("guard.diversity", "guard.diversity_floor", (0.0,)),
    ("eval_forward_kl", "eval_freq", (0,)),
    ("sample.noise_level", "sample.sde_type", ("ode",)),
)
FOUND = (("anchored.strength", "anchored.target_kl"), ("anchored.strength", "anchored.target_diversity"))  # by a target


def check_read(config: ConfigDict | FrozenConfigDict, changed: Iterable[str]) -> None:
    """ConfigError for the first of the changed keys that the run would not look at: the change would do nothing."""
    changed = list(changed)
    _check_methods_keys(config, changed)
    for key, other, values in MOOT:
        if key in changed and _value(config, other) in values:
            _refuse(config, key, f"is not read with config.{other} = {_value(config, other)!r}; change that, too")
    for key, target in FOUND:
        if key in changed and _value(config, target):
            _refuse(config, key, f"is found by the run with config.{target} = {_value(config, target)!r}")


def _refuse(config: ConfigDict | FrozenConfigDict, key: str, because: str) -> None:
    raise ConfigError(f"config.{key} = {_value(config, key)!r} {because}, or leave config.{key} out.")


def _check_methods_keys(config: ConfigDict | FrozenConfigDict, changed: Iterable[str]) -> None:
    method = method_of(config)
    for key in changed:
        if _is_unread(method, key):
            raise ConfigError(
                f"config.{key} = {_value(config, key)!r} is not read by config.train.method = {method.name!r}; leave "
                f"it out, or choose {_either(readers(key))}."
            )


def _value(config: ConfigDict | FrozenConfigDict, key: str) -> object:
    value = config
    for part in key.split("."):
        value = value[part]
    return value
