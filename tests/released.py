"""The shape of the released checkpoint: model.released, under the name that tests know."""

from model.released import RELEASED as RELEASED
from model.released import RELEASED_CONFIG as RELEASED_CONFIG
