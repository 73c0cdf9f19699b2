"""Exports the model (TwoTower, load_model), the engine that generates with it, and the types and errors of its calls.

Each name is imported on its first use. So torch is not loaded by importing this package or one of its modules that do
not need torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.engine.engine import Engine as Engine
    from model.errors import CheckpointError as CheckpointError
    from model.errors import RequestError as RequestError
    from model.errors import TwoTowerError as TwoTowerError
    from model.network.two_tower import TwoTower as TwoTower
    from model.network.two_tower import load_model as load_model
    from model.requests import Completion as Completion
    from model.requests import EngineError as EngineError
    from model.requests import EngineLimits as EngineLimits
    from model.requests import GenerationParams as GenerationParams
    from model.requests import Request as Request

_HOME = {
    "Engine": "model.engine.engine",
    "CheckpointError": "model.errors",
    "EngineError": "model.requests",
    "RequestError": "model.errors",
    "TwoTowerError": "model.errors",
    "Completion": "model.requests",
    "EngineLimits": "model.requests",
    "GenerationParams": "model.requests",
    "Request": "model.requests",
    "TwoTower": "model.network.two_tower",
    "load_model": "model.network.two_tower",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'model' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
