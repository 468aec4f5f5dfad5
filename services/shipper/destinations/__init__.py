"""The kinds of destination: one module each, chosen by the URL's scheme."""

from crashbus.destination import Destination
from services.shipper.destinations.base import Deliverer
from services.shipper.destinations.file import FileDeliverer
from services.shipper.destinations.s3 import S3Deliverer
from services.shipper.destinations.tcp import TcpDeliverer
from services.shipper.settings import ShipperSettings


def deliverer(destination: Destination, settings: ShipperSettings) -> Deliverer:
    """Return what delivers to a destination.

    Raises:
        SettingsError: a setting that this kind of destination needs is missing or wrong.
    """
    match destination.scheme:
        case "s3":
            return S3Deliverer(destination, settings)
        case "tcp" | "tls":
            return TcpDeliverer(destination, settings)
        case "file":
            return FileDeliverer(destination)
