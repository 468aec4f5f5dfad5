"""A destination that is served."""

from dataclasses import dataclass

from crashbus.destination import parse
from services.common.health import Health
from services.shipper.destinations import deliverer
from services.shipper.destinations.base import Deliverer
from services.shipper.policy import Policy
from services.shipper.settings import ShipperSettings
from services.shipper.standing import Standing


@dataclass(frozen=True)
class Place:
    """A destination that the settings name, and what delivers to it."""

    deliverer: Deliverer
    standing: Standing
    policy: Policy

    @classmethod
    def at(cls, url: str, settings: ShipperSettings, health: Health) -> "Place":
        """Return the place of a destination's URL.

        Raises:
            SettingsError: a setting that this kind of destination needs is missing or wrong.
        """
        destination = parse(url)
        policy = Policy.of(destination.scheme, settings)
        standing = Standing(destination.url, health, policy)
        return cls(deliverer(destination, settings), standing, policy)

    @property
    def url(self) -> str:
        """As work items name it."""
        return self.deliverer.destination.url
