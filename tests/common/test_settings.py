"""Settings: where they come from, and what is said of a wrong one."""

import subprocess
import sys
from pathlib import Path

import pytest

from crashbus.signals import CRASH_SIGNALS
from services.collector.settings import CollectorSettings
from services.common.bus_settings import BusSettings
from services.common.settings import Settings, SettingsError
from services.recorder.settings import RecorderSettings
from services.shipper.settings import ShipperSettings


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "crashbus.toml"
    monkeypatch.setenv("CRASHBUS_CONFIG", str(path))
    return path


def test_environment_comes_before_the_secret_file_and_that_before_the_table(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text('[shipper]\ns3_secret_key = "from the table"\n')
    assert secret() == "from the table"
    (tmp_path / "secret").write_text("from the file\n")
    monkeypatch.setenv("CRASHBUS_SHIPPER_S3_SECRET_KEY_FILE", str(tmp_path / "secret"))
    assert secret() == "from the file"
    monkeypatch.setenv("CRASHBUS_SHIPPER_S3_SECRET_KEY", "from the environment")
    assert secret() == "from the environment"


def secret() -> str:
    key = ShipperSettings.load().s3_secret_key
    assert key is not None
    return key.get_secret_value()


def test_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRASHBUS_SHIPPER_S3_SECRET_KEY", "very secret")
    assert "very secret" not in repr(ShipperSettings.load())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("collector = 3\n", "collector must be a table"),
        ("[colector]\n", r"there is no table \[colector\]"),
        ("[collector]\ncompresion = 3\n", "has no setting compresion"),
        ("[collector]\ncompression = 'much'\n", "CRASHBUS_COLLECTOR_COMPRESSION.*integer"),
        ("[collector\n", "CRASHBUS_CONFIG names"),
    ],
)
def test_wrong_file_is_said_with_its_place(config: Path, text: str, said: str) -> None:
    config.write_text(text)
    with pytest.raises(SettingsError, match=said):
        CollectorSettings.load()


def test_missing_file_is_said(config: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        CollectorSettings.load()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("CRASHBUS_COLLECTOR_COMPRESSION", "much", "CRASHBUS_COLLECTOR_COMPRESSION.*'much'"),
        ("CRASHBUS_COLLECTOR_KEEP_DELIVERED", "-1", "greater than or equal to 0"),
        ("CRASHBUS_COLLECTOR_COMPRESION", "3", "did you mean CRASHBUS_COLLECTOR_COMPRESSION"),
    ],
)
def test_wrong_variable_is_said_with_its_name(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=said):
        CollectorSettings.load()


def test_cores_of_the_kernels_stream_cannot_go_straight_to_the_bus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CRASHBUS_RECORDER_CORE_TO", "bus")
    monkeypatch.setenv("CRASHBUS_RECORDER_CORE_SOURCE", "stream")
    with pytest.raises(SettingsError, match=r"CRASHBUS_RECORDER_CORE_TO.*not with CORE_SOURCE"):
        RecorderSettings.load()


@pytest.mark.parametrize(
    ("value", "source", "said"),
    [
        ("all", "auto", "no mask of core"),
        ("0x200", "auto", "no mask of core"),
        ("-1", "auto", "no mask of core"),
        ("0x32", "auto", "lacks bit 0"),
        ("0x31", "stream", "not with COREDUMP_FILTER"),
    ],
)
def test_filter_that_cannot_be_gone_by_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: str, source: str, said: str
) -> None:
    monkeypatch.setenv("CRASHBUS_RECORDER_COREDUMP_FILTER", value)
    monkeypatch.setenv("CRASHBUS_RECORDER_CORE_SOURCE", source)
    with pytest.raises(SettingsError, match=said):
        RecorderSettings.load()


def test_one_runtime_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRASHBUS_RECORDER_RUNTIME_SOCKET", "/run/docker.sock")
    monkeypatch.setenv("CRASHBUS_RECORDER_CRI_SOCKET", "/run/crio/crio.sock")
    with pytest.raises(SettingsError, match=r"CRASHBUS_RECORDER_CRI_SOCKET.*one runtime"):
        RecorderSettings.load()


def test_filter_is_hexadecimal_as_the_kernel_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RecorderSettings.load().coredump_filter_mask is None
    monkeypatch.setenv("CRASHBUS_RECORDER_COREDUMP_FILTER", "31")
    assert RecorderSettings.load().coredump_filter_mask == 0x31


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("CRASHBUS_DESTINATIONS", "ftp://host/path", "s3://, tcp://, tls:// or file://"),
        ("CRASHBUS_NATS_ULR", "x", "did you mean CRASHBUS_NATS_URL"),
        ("CRASHBUS_NATS_URL", "nats://host:notaport", "CRASHBUS_NATS_URL"),
        ("CRASHBUS_LOG_LEVEL", "loud", "CRASHBUS_LOG_LEVEL"),
    ],
)
def test_wrong_shared_variable_is_said(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=said):
        BusSettings.load()


def test_variables_of_other_services_are_none_of_our_business(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CRASHBUS_SHIPPER_CONCURRENCY", "2")
    BusSettings.load()
    CollectorSettings.load()


def test_unreadable_secret_file_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRASHBUS_NATS_PASSWORD_FILE", "/nowhere/password")
    with pytest.raises(SettingsError, match=r"CRASHBUS_NATS_PASSWORD_FILE names /nowhere/password"):
        BusSettings.load()


@pytest.mark.parametrize("service", ["detector", "recorder", "collector", "shipper"])
def test_help_names_every_setting_with_its_default(service: str) -> None:
    command = [sys.executable, "-m", f"services.{service}", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"CRASHBUS_{service.upper()}_HTTP" in text
    assert "CRASHBUS_NATS_URL" in text
    assert "default: nats://127.0.0.1:4222" in text


def test_help_shows_a_list_as_it_is_given() -> None:
    command = [sys.executable, "-m", "services.detector", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    shown = f"CRASHBUS_DETECTOR_SIGNALS (default: {','.join(CRASH_SIGNALS)})"
    assert shown in text


_BUCKET_CANNOT = "bucket that cannot be asked: "


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"DEBUGINFOD_URLS": "s3://a..b"}, "_DEBUGINFOD_URLS: .*no '.' beside a '.'"),
        ({"DEBUGINFOD_URLS": "s3://10.0.0.1/x"}, "_DEBUGINFOD_URLS: .*is no IP address"),
        ({"S3_ENDPOINT": "https://host:port"}, "_S3_ENDPOINT: 'host:port' is no host"),
        ({"S3_ENDPOINT": "https://ho st"}, "_S3_ENDPOINT: 'ho st' is no host"),
        ({"S3_ENDPOINT": "https://host?x"}, "_S3_ENDPOINT: .* is no host"),
        ({"S3_ENDPOINT": "https://host:99999"}, f"{_BUCKET_CANNOT}invalid port; correct"),
        ({"S3_REGION": "a/b"}, f"{_BUCKET_CANNOT}invalid region a/b; correct"),
        ({"S3_ACCESS_KEY": "key"}, f"{_BUCKET_CANNOT}secret key must be provided"),
        ({"S3_SECRET_KEY": "key"}, "_S3_SECRET_KEY is given without"),
    ],
)
def test_bucket_of_debug_information_that_can_never_be_asked_is_said(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], said: str
) -> None:
    for name, value in ({"DEBUGINFOD_URLS": "s3://debug/x"} | settings).items():
        monkeypatch.setenv(f"CRASHBUS_RECORDER_{name}", value)
    with pytest.raises(SettingsError, match=said):
        RecorderSettings.load()


@pytest.mark.parametrize("endpoint", ["http://[::1]:9000", "https://s3.eu-west-1.amazonaws.com/"])
def test_bucket_of_debug_information_that_can_be_asked_is_taken(
    monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("CRASHBUS_RECORDER_DEBUGINFOD_URLS", "s3://debug/x https://debuginfod")
    monkeypatch.setenv("CRASHBUS_RECORDER_S3_ENDPOINT", endpoint)
    assert RecorderSettings.load().s3_endpoint == endpoint.rstrip("/")


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("CRASHBUS_NATS_NKEY", "SUnotaseed", "CRASHBUS_NATS_NKEY is no seed"),
        ("CRASHBUS_NATS_CA_FILE", "/nowhere/ca.pem", "CRASHBUS_NATS_CA_FILE: cannot use it"),
        ("CRASHBUS_NATS_CERT_FILE", "/nowhere/own.pem", "CRASHBUS_NATS_CERT_FILE: cannot use it"),
        ("CRASHBUS_NATS_KEY_FILE", "/nowhere/own.key", "CRASHBUS_NATS_KEY_FILE is the key of"),
    ],
)
def test_keys_and_certificates_that_cannot_be_used_are_said(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=said) as raised:
        BusSettings.load().connection_options("test")
    assert "SUnotaseed" not in str(raised.value)


def test_a_file_is_no_way_to_give_what_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRASHBUS_NATS_URL_FILE", "/etc/crashbus/url")
    with pytest.raises(SettingsError, match="CRASHBUS_NATS_URL_FILE: there is no such setting"):
        BusSettings.load()


def test_an_empty_secret_file_is_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").write_text("\n")
    monkeypatch.setenv("CRASHBUS_SHIPPER_S3_SECRET_KEY_FILE", str(tmp_path / "empty"))
    assert ShipperSettings.load().s3_secret_key is None


@pytest.mark.parametrize(
    ("cls", "variable", "value"),
    [
        (BusSettings, "CRASHBUS_NATS_URL", "http://me:s3cret@host"),
        (BusSettings, "CRASHBUS_NATS_URL", "wss://me:s3cret@host"),
        (BusSettings, "CRASHBUS_DESTINATIONS", "s3://me:s3cret@bucket"),
        (BusSettings, "CRASHBUS_DESTINATIONS", "tcp://me:s3cret@host:1?x"),
        (ShipperSettings, "CRASHBUS_SHIPPER_S3_ENDPOINT", "https://me:s3cret@host"),
        (RecorderSettings, "CRASHBUS_RECORDER_S3_ENDPOINT", "https://me:s3cret@host"),
        (RecorderSettings, "CRASHBUS_RECORDER_DEBUGINFOD_URLS", "https://me:s3cret@host/x"),
        (RecorderSettings, "CRASHBUS_RECORDER_DEBUGINFOD_URLS", "ftp://me:s3cret@host"),
        *(
            (cls, variable, f"{scheme}://{user}@host:4222")
            for cls, variable, scheme in (
                (BusSettings, "CRASHBUS_NATS_URL", "http"),
                (BusSettings, "CRASHBUS_DESTINATIONS", "s3"),
                (BusSettings, "CRASHBUS_DESTINATIONS", "tcp"),
                (RecorderSettings, "CRASHBUS_RECORDER_DEBUGINFOD_URLS", "https"),
                (RecorderSettings, "CRASHBUS_RECORDER_S3_ENDPOINT", "https"),
            )
            for user in (
                "s3cret" * 60,
                "s3cret" * 200,
                f"me:{'s3cret' * 60}",
                "me:x#s3cret",
                "me:x/s3cret",
            )
        ),
        (BusSettings, "CRASHBUS_NATS_URL", "nats://me:s3cret/x@host"),
        (BusSettings, "CRASHBUS_DESTINATIONS", "s3://me:s3cret/x@bucket"),
    ],
)
def test_a_password_in_a_url_that_is_refused_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, cls: type[Settings], variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=variable) as error:
        cls.load()
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://user:12/ss@host", "leave them out"),
        ("https://host/a@b", "%40"),
        ("https://host:port/", "host\\[:port"),
        ("https://host:99999", "host\\[:port"),
        ("https:///path", "host\\[:port"),
        ("https://host?x=1", "host\\[:port"),
        ("https://host/x#y", "host\\[:port"),
        ("https://[::1/", "host\\[:port"),
    ],
)
def test_server_of_debug_information_that_others_would_read_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch, url: str, said: str
) -> None:
    monkeypatch.setenv("CRASHBUS_RECORDER_DEBUGINFOD_URLS", f"https://good {url}")
    with pytest.raises(SettingsError, match=said):
        RecorderSettings.load()


@pytest.mark.parametrize("url", ["https://host/a%40b", "http://[::1]:8002", "http://h:1/p/"])
def test_server_of_debug_information_is_taken_as_given(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("CRASHBUS_RECORDER_DEBUGINFOD_URLS", url)
    assert RecorderSettings.load().debug_sources.urls("ab")[0].startswith(url.rstrip("/"))
