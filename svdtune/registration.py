"""Registers the method with PEFT, which has no entry points for external methods."""

from __future__ import annotations

import threading

from peft.utils import PeftType, register_peft_method

NAME = "svd_scale_shift"
_lock = threading.Lock()


def peft_type() -> PeftType:
    """The member of ``peft.PeftType`` for this method. The first call adds it.

    Raises:
        RuntimeError: if this version of Python or PEFT does not allow new members.
    """
    member_name = NAME.upper()
    with _lock:
        if member_name not in PeftType.__members__:
            _add_member(PeftType, member_name)
    member = PeftType(member_name)
    if getattr(PeftType, member_name) is not member or member not in list(PeftType) or member.value != member_name:
        raise RuntimeError(
            f"Could not add {member_name} to peft.PeftType; please report your Python and peft versions to svdtune."
        )
    return member


def _add_member(enumeration, name: str) -> None:
    """Adds a member as the enum metaclass does for a class body. The value of each member is its name."""
    member = str.__new__(enumeration, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = enumeration
    member._sort_order_ = len(enumeration._member_names_)
    # Python 3.12 finds members only as class attributes. Set it first: the metaclass forbids it for names in the map.
    setattr(enumeration, name, member)
    enumeration._member_names_.append(name)
    enumeration._member_map_[name] = member
    enumeration._value2member_map_[name] = member


def register(config_cls: type, model_cls: type) -> None:
    """Registers the method as ``SVD_SCALE_SHIFT``. A second call with the same classes does nothing."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type()) is not model_cls:
        register_peft_method(name=NAME, config_cls=config_cls, model_cls=model_cls)
