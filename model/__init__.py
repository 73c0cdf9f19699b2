"""TwoTower: the model, and the engine that generates with it.

Names are loaded on first use, so that importing this package, or one of its torch-free modules, does not load torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.engine import Engine as Engine
    from model.errors import CheckpointError as CheckpointError
    from model.errors import EngineError as EngineError
    from model.errors import RequestError as RequestError
    from model.errors import TwoTowerError as TwoTowerError
    from model.params import Completion as Completion
    from model.params import EngineLimits as EngineLimits
    from model.params import GenerationParams as GenerationParams
    from model.params import Request as Request
    from model.two_tower import TwoTower as TwoTower
    from model.two_tower import load_model as load_model

_HOME = {
    "Engine": "model.engine",
    "CheckpointError": "model.errors",
    "EngineError": "model.errors",
    "RequestError": "model.errors",
    "TwoTowerError": "model.errors",
    "Completion": "model.params",
    "EngineLimits": "model.params",
    "GenerationParams": "model.params",
    "Request": "model.params",
    "TwoTower": "model.two_tower",
    "load_model": "model.two_tower",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'model' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
