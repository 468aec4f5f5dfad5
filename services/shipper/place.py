"""A destination that is served."""

from dataclasses import dataclass

from services.shipper.destinations.base import Deliverer
from services.shipper.standing import Standing


@dataclass(frozen=True)
class Place:
    """A destination that the settings name, and what delivers to it."""

    deliverer: Deliverer
    standing: Standing

    @property
    def url(self) -> str:
        """As work items name it."""
        return self.deliverer.destination.url
