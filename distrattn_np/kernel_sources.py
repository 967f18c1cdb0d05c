"""raw_kernels/ as text: one translation unit a kernel, the options that compile it, its arguments, its launch rule.

Needs no CUDA package, so that kernels can be planned and compiled where there is no device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources

from .tiles import Defines

HOPPER_ONLY = "_sm90"
"""How the stems end whose instructions only sm_90a has."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument of a kernel."""

    type: str
    """As in the source, such as ``const float*``; `element_t` and its like are resolved by ELEMENT (element.cuh)."""
    name: str

    @property
    def is_pointer(self) -> bool:
        """Whether it is an address on the device."""
        return self.type.endswith("*")


def kernel_source(stem: str) -> str:
    """Return the text of a kernel with our headers spliced in.

    CuPy's cache on disk is keyed by the source text and does not read headers found through -I: with the headers inside
    the text, an edit of one can never meet a stale binary.
    """
    spliced: set[str] = set()

    def splice(name: str) -> str:
        if name in spliced:  # what #pragma once does for files
            return ""
        spliced.add(name)
        text = _read(name).replace("#pragma once\n", "")
        return re.sub(r'^#include "([\w.]+)".*$', lambda match: splice(match[1]), text, flags=re.MULTILINE)

    return splice(f"{stem}.cu")


def options(defines: Defines) -> list[str]:
    """Return the compiler's options beside the architecture."""
    return ["--std=c++17", *(f"-D{name}={value}" for name, value in defines.items())]


def parameters(stem: str, defines: Defines) -> list[Parameter]:
    """Return the arguments of a kernel as its source lists them, with the conditions that ``defines`` decides."""
    text = re.sub(r"//[^\n]*", "", _read(f"{stem}.cu"))
    signature = re.search(rf'extern "C" __global__[^;{{]*?\b{stem}\s*\((.*?)\)\s*\{{', text, flags=re.DOTALL)
    if signature is None:
        raise ValueError(f"{stem}.cu: has no kernel of its name")
    macros = dict(re.findall(r"^#define (\w+) +(.+?) *$", text, flags=re.MULTILINE))
    kept, keeps = [], [True]
    for line in signature[1].splitlines():
        match line.split(maxsplit=1):
            case ["#if", condition]:
                keeps.append(_holds(condition, defines, macros))
            case ["#else"]:
                keeps.append(not keeps.pop())
            case ["#endif"]:
                keeps.pop()
            case [word, *_] if word.startswith("#"):
                raise ValueError(f"{stem}.cu: the signature has {line.strip()}, which is not read here")
            case _ if all(keeps):
                kept.append(line)
    found = []
    for declaration in "".join(kept).split(","):
        words = re.sub(r"\b__(?:restrict|grid_constant)__\b", "", declaration).replace("*", "* ").split()
        found.append(Parameter(" ".join(words[:-1]).replace(" *", "*"), words[-1]))
    return found


def launch_rule(stem: str) -> dict[str, str]:
    """Return what the head of a source says of its launch: "grid", "block" and, where it has a line, "shared"."""
    head = _read(f"{stem}.cu").partition("\n#include")[0]
    lines = re.findall(r"^// (\w+) +: (.*(?:\n//             .*)*)", head, flags=re.MULTILINE)
    wanted = {"Grid": "grid", "Block": "block", "Shared": "shared"}
    return {wanted[name]: re.sub(r"(?:\n//)? +", " ", text) for name, text in lines if name in wanted}


def _holds(condition: str, defines: Defines, macros: dict[str, str]) -> bool:
    """Whether a condition of names, !, && and || holds, with the -D options and what the source defines itself."""
    inner = condition.strip().removeprefix("(").removesuffix(")")
    if not re.fullmatch(r"(!?\w+(\s*(&&|\|\|)\s*|$))+", inner):
        raise ValueError(f"#if {condition}: more than names, !, && and ||, which is not read here")

    def is_set(name: str) -> bool:
        if name in defines or name.isdigit():
            return int(defines.get(name, name)) != 0
        return name in macros and _holds(macros[name], defines, macros)

    return any(
        all(is_set(term.strip(" !")) != term.strip().startswith("!") for term in clause.split("&&"))
        for clause in inner.split("||")
    )


def _read(name: str) -> str:
    return resources.files("distrattn_np.raw_kernels").joinpath(name).read_text(encoding="utf-8")
