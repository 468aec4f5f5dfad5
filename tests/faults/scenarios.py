"""What is done, and what is expected of it: the table of all faults.

A fault is a context: entered, it is there; left, it is over.
"""

from dataclasses import dataclass

from tests.faults import bus, disks, kills, s3
from tests.faults.crashes import MIB
from tests.faults.meddling import damaged, late, of_another_file, repeated
from tests.faults.ways import Fault, bad, cut_again_and_again, flipped, flips, silent, slow


@dataclass(frozen=True)
class Scenario:
    """A fault and what is expected of it.

    Attributes:
        first: it is there before crashes come; else it comes at a random moment while they are
            delivered.
        lasts: seconds, the shortest and the longest.
        noisy: cores are large and do not compress.
        replayed: crashes are told as failed, and delivered once they are replayed.
    """

    name: str
    fault: Fault
    first: bool = False
    lasts: tuple[float, float] = (0.2, 1.5)
    replayed: bool = False
    noisy: bool = False

    def __str__(self) -> str:
        return self.name


PROCESSES = (
    Scenario("collector: SIGKILL", kills.collector_killed),
    Scenario("collector: SIGSTOP", kills.collector_stopped),
    Scenario("shipper: SIGKILL", kills.shipper_killed),
    Scenario("shipper: SIGSTOP, longer than its items wait", kills.shipper_stopped, lasts=(4, 6)),
    Scenario("all shippers: SIGKILL", kills.all_shippers_killed),
    Scenario("all services and nats-server: SIGKILL", kills.all_killed),
    Scenario("disk of the ledger full", disks.ledger_full),
    Scenario("disk of the ledger hangs", disks.ledger_hangs),
)
BUS = (
    Scenario("nats-server: SIGKILL", bus.nats_killed),
    Scenario("nats-server: SIGSTOP", bus.nats_stopped),
    Scenario("nats-server: SIGKILL, its store is lost", bus.nats_store_lost),
    Scenario("chunks vanish from the bus", bus.chunks_lost, noisy=True),
    Scenario("bus has room for one core, nothing is taken", bus.store_full, first=True, noisy=True),
    Scenario("disk of nats-server full, restarted", bus.disk_full, first=True),
    Scenario("collector's way to the bus: slow", slow("collector_way", latency=0.1)),
    Scenario("shippers' way to the bus: slow", slow("shipper_way", latency=0.1)),
    Scenario("collector's way to the bus: silent", silent("collector_way")),
    Scenario("shippers' way to the bus: silent", silent("shipper_way")),
    Scenario(
        "collector's way to the bus: cut again and again", cut_again_and_again("collector_way")
    ),
    Scenario("shippers' way to the bus: cut again and again", cut_again_and_again("shipper_way")),
    Scenario("bytes flipped on the way to the bus", flips("collector_way", "up"), first=True),
    Scenario("bytes flipped on the way from the bus", flips("shipper_way", "down"), first=True),
    Scenario("work items twice, the last first", repeated("crash.file.>", 3), first=True),
    Scenario("chunks twice, the last first", repeated("crash.chunk.>", 2), first=True),
    Scenario(
        "chunks and work items again, when all is delivered",
        late("crash.chunk.>", "crash.small.>", "crash.file.>"),
        first=True,
    ),
    Scenario("damaged copies of chunks", damaged("crash.chunk.>", 2, flipped), first=True),
    Scenario("damaged copies of work items", damaged("crash.file.>", 3, flipped), first=True),
    Scenario(
        "work items with another file's hash",
        damaged("crash.file.>", 3, of_another_file),
        first=True,
    ),
    Scenario("receipts lost", bus.receipts_lost),
)
S3 = (
    Scenario("S3 server: SIGKILL", s3.gateway_killed),
    Scenario("S3 server: SIGSTOP", s3.gateway_stopped, lasts=(1, 4)),
    Scenario("S3 server: its store SIGSTOP", s3.store_stopped),
    Scenario("S3 server: SlowDown", s3.slow_down, first=True),
    Scenario("S3 server: out of quota", s3.out_of_quota, first=True),
    Scenario("S3 server: user suspended", s3.user_suspended, first=True, replayed=True),
    Scenario("way to S3: slow", slow("s3_way", latency=0.3)),
    Scenario("way to S3: silent", silent("s3_way"), lasts=(1, 4)),
    Scenario("way to S3: refuses", bad("s3_way", "connections refused", refuses=True), first=True),
    Scenario(
        "way to S3: reset within a part",
        bad("s3_way", "connections reset", reset_after=3 * MIB),
        first=True,
        noisy=True,
    ),
    Scenario(
        "way to S3: answers are lost",
        bad("s3_way", "answers lost", loses_answers=True),
        first=True,
    ),
    Scenario("way to S3: cut again and again", cut_again_and_again("s3_way")),
    Scenario("bytes flipped on the way to S3", flips("s3_way", "up"), first=True),
)
# With real crashes.
CAPTURE = (
    Scenario("real crashes, detector: SIGKILL", kills.detector_killed),
    Scenario("real crashes, detector: SIGSTOP", kills.detector_stopped),
    Scenario("real crashes, recorder: SIGKILL", kills.recorder_killed),
    Scenario("real crashes, recorder: SIGSTOP", kills.recorder_stopped, lasts=(0.2, 6)),
    Scenario("real crashes, all but the detector: SIGKILL", kills.all_killed),
    Scenario("real crashes, nats-server: its store is lost", bus.nats_store_lost),
    Scenario("real crashes, disk of the spool full", disks.spool_full, first=True),
)
ALL = PROCESSES + BUS + S3 + CAPTURE
