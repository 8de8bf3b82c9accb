"""The policies that the tests run, and the one function that says how many image tokens each must keep.

A new policy needs one line in `CASES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tests.tiny_random import TOKENS_PER_IMAGE


@dataclass(frozen=True)
class Case:
    """A policy as a user writes it.

    `kept` is the number of image tokens that stay of each 16-token image (None: it varies); `full` the arguments with
    which it must equal full context. `gates` is their number inside the LLM.
    """

    text: str
    kept: int | None
    full: str
    cacheless: bool = True
    gates: int = 1


def floor(rate: float) -> int:
    return max(1, math.floor(rate * TOKENS_PER_IMAGE + 1e-9))


CASES = [
    Case("full", 16, "full"),
    Case("image", floor(0.3), "image,keep=1"),
    Case("image_text,keep=0.5", 8, ""),
    Case("text", 16, ""),
    Case("fastv,k=3,r=0.75", 4, "fastv,k=3,r=0"),
    Case("fastv,k=1,keep=0.4", floor(0.4), "fastv,keep=1"),
    Case("fastv+text,k=2", floor(0.3), ""),
    Case("random,r=0.1", 1, "random,r=1"),
    Case("random_text,r=0.4", 16, "random_text,r=1"),
    Case("structure", 16, "structure,period=1"),
    Case("image+structure,layer=3", floor(0.3), "image+structure,keep=1,period=1"),
    Case("h2o,r=0.5", 16, "h2o,r=1", cacheless=False),
    Case("fastv+h2o,k=1,fastv.r=0.5,h2o.r=0.4", 8, "fastv+h2o,keep=1,h2o.r=1", cacheless=False),
    Case("downsample,r=0.4", 6, "downsample,r=1"),
    Case("visionzip,n=6,contextual=2", 6, "visionzip,n=16"),
    Case("visionzip+text,positions=original", floor(0.3), ""),
    Case("divprune,r=0.25", 4, "divprune,r=1"),
    Case("cdpruner,n=5", 5, "cdpruner,n=16"),
    Case("prumerge+", None, ""),
    Case("prumerge+,keep=0.4", floor(0.4), "prumerge+,keep=1"),
    Case("pyramiddrop,stages=2,at=2-4,ratio=0.6", 5, "pyramiddrop,keep=1", gates=2),
    Case("pyramiddrop,tokens=12", 10, "", gates=3),
    Case("pyramiddrop,at=3,keep=0.25", 4, ""),
    Case("pyramiddrop+text,ratio=0.5", 2, "", gates=3),
    Case("dart,keep=0.6", 9, "dart,keep=1"),
    Case("dart,pivots=2,layer=1,tokens=13", 12, ""),
    Case("snapkv,r=0.5,window=4,kernel=3", 16, "snapkv,r=1", cacheless=False),
    Case("fastv+snapkv,k=2,fastv.r=0.5,snapkv.r=0.6", 8, "fastv+snapkv,keep=1,snapkv.r=1", cacheless=False),
    Case("fastervlm,n=6", 6, "fastervlm,n=16"),
    Case("vispruner,n=7,positions=original", 7, "vispruner,n=16"),
    Case("vispruner,tokens=3", 3, ""),
    Case("fastv,tokens=12,k=1", 11, ""),
    Case("fastv+random_text,fastv.r=0.5,random_text.r=0.5", 8, ""),
    Case("image,threshold=0.5", None, "image,threshold=0"),
    Case("image_text,threshold=0.6,layer=1", None, ""),
    Case("holov,n=7,crops=3", 7, "holov,n=16"),
    Case("hiprune,n=9,alpha=0.8", 9, "hiprune,n=16"),
    Case("v2drop,shares=0.7-0.4-0.1", 1, "v2drop,keep=1", gates=3),
    Case("v2drop+text,ratio=0.8,layer=2", 8, "", gates=3),
    Case("sparsevlm,at=1-3,ratio=0.6", 5, "sparsevlm,keep=1", gates=2),
    Case("sparsevlm,keep=0.4,recycled=1", floor(0.4), "", gates=3),
    Case("pyramidkv,r=0.5,window=4,beta=4", 16, "pyramidkv,r=1", cacheless=False),
    Case("fastv+pyramidkv,k=2,fastv.r=0.5,pyramidkv.r=0.6", 8, "", cacheless=False),
    Case("schedule,steps=2:fastv:0.5-4:random:0.3", floor(0.3), "schedule,2:fastv:1", gates=2),
    Case("schedule+text,steps=0:divprune:0.5-2:fastv:0.3", floor(0.3), "", gates=2),
]
IDS = [case.text for case in CASES]

Picker = Callable[[Case], bool]


def cases(picked: Picker = lambda case: True) -> dict:
    """For `pytest.mark.parametrize`."""
    chosen = [case for case in CASES if picked(case)]
    return {"argnames": "case", "argvalues": chosen, "ids": [case.text for case in chosen]}
