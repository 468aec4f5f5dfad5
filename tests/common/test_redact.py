"""Secrets are recognised by name and by form."""

import random
import string
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common import redact
from services.common.redact import REDACTED, environment, is_secret, text


def arguments(given: tuple[str, ...], is_cut: bool = False) -> tuple[str, ...]:
    return tuple(redact.arguments(given, {len(given) - 1} if is_cut else ()))


@pytest.mark.parametrize(
    "name",
    [
        *("API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "DB_PASSWORD", "PGPASSWORD"),
        *("MYSQL_PWD", "SMTP_PASS", "COOKIE", "session_id", "PRIVATE"),
        *("DBPASS", "userpass", "PASS1", "PASSCODE", "sig"),
        *("DB_PW", "pw", "WIFI_PSK", "APP_JWT", "PASSWORD_SALT", "AUTHORIZATION", "OAUTH"),
        *("--api-key", "spring.datasource.password", "Authorization"),
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        *("PATH", "HOME", "PWD", "OLDPWD", "LANG", "BYPASS", "--verbose", "compass", "SIGNAL"),
        *("GIT_AUTHOR_NAME", "AUTHORS", "KEYBOARD", "TOKENIZERS_PARALLELISM", "MAX_TOKENS"),
        *("SSH_AUTH_SOCK", "XDG_SESSION_TYPE", "--sort-key", "--author"),
    ],
)
def test_names_of_no_secrets(name: str) -> None:
    assert not is_secret(name)


def test_environment() -> None:
    given_ = ("A=1", "DB_PASSWORD=x=y", "EMPTY_TOKEN=", "NOTHING", "URL=amqp://u:p@mq/v@x")

    assert environment(given_) == (
        "A=1",
        f"DB_PASSWORD={REDACTED}",
        "EMPTY_TOKEN=",
        "NOTHING",
        f"URL=amqp://{REDACTED}@mq/v@x",
    )


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (("--password=x",), (f"--password={REDACTED}",)),
        (("--password", "x", "y"), ("--password", REDACTED, "y")),
        (("--auth", "--verbose"), ("--auth", "--verbose")),
        (("--auth", "--level=2", "--", "-v"), ("--auth", "--level=2", "--", "-v")),
        (("--password", "-x7/", "y"), ("--password", REDACTED, "y")),
        (("sh", "-c", "mysql --password x db"), ("sh", "-c", f"mysql --password {REDACTED} db")),
        (("-Dx.trustStorePassword=x",), (f"-Dx.trustStorePassword={REDACTED}",)),
        (("PASSWORD=x", "make"), (f"PASSWORD={REDACTED}", "make")),
        (("-H", "Authorization: Bearer x"), ("-H", f"Authorization:{REDACTED}")),
        (("https://u:p@host/a?b=c",), (f"https://{REDACTED}@host/a?b=c",)),
        (("--url=https://u:p@host",), (f"--url=https://{REDACTED}@host",)),
        (("key://host/path",), ("key://host/path",)),
        (("--token",), ("--token",)),
        ((), ()),
    ],
)  # fmt: skip
def test_arguments(raw: tuple[str, ...], shown: tuple[str, ...]) -> None:
    assert arguments(raw) == shown


_CHANCE = random.Random(28)


def made(count: int, of: str = string.ascii_letters + string.digits) -> str:
    """Return characters, made here so that no scanner of sources takes them for a secret."""
    return "".join(_CHANCE.choices(of, k=count))


_UPPER, _HEX = string.ascii_uppercase + string.digits, "0123456789abcdef"
_URL_SAFE = string.ascii_letters + string.digits + "-_"
PEM = ("-----BEGIN ", "PRIVATE KEY-----")
# In the forms that their issuers document.
TOKENS = {
    "AWS access key": f"AKIA{made(16, _UPPER)}",
    "AWS temporary key": f"ASIA{made(16, _UPPER)}",
    "AWS Bedrock key": f"ABSK{made(109)}",
    **{f"GitHub gh{kind}_": f"gh{kind}_{made(36)}" for kind in "oprsu"},
    "GitHub fine-grained": f"github_pat_{made(22)}_{made(59)}",
    "GitLab": f"glpat-{made(20, _URL_SAFE)}",
    "GitLab runner": f"glrt-{made(20, _URL_SAFE)}",
    "GitLab deploy": f"gldt-{made(20, _URL_SAFE)}",
    "GitLab job": f"glcbt-64_{made(20)}",
    "Bitbucket": f"ATBB{made(32)}",
    "Atlassian": f"ATATT3xFfGF0{made(170, _URL_SAFE)}={made(8, _HEX)}",
    **{f"Slack xox{kind}": f"xox{kind}-{made(11, '123')}-{made(24)}" for kind in "abprs"},
    "Slack app": f"xapp-1-A{made(10, _UPPER)}-{made(13, '123')}-{made(64, _HEX)}",
    "Slack configuration": f"xoxe.xoxp-1-{made(160)}",
    "Slack webhook": f"hooks.slack.com/services/T{made(8, _UPPER)}/B{made(8, _UPPER)}/{made(24)}",
    "Discord webhook": f"discord.com/api/webhooks/{made(18, '123')}/{made(68, _URL_SAFE)}",
    "Telegram bot": f"{made(10, '123456')}:AA{made(33, _URL_SAFE)}",
    "Stripe": f"sk_live_{made(24)}",
    "Stripe restricted": f"rk_test_{made(24)}",
    "Stripe webhook": f"whsec_{made(32)}",
    "OpenAI": f"sk-{made(48)}",
    "OpenAI project": f"sk-proj-{made(60, _URL_SAFE)}",
    "Anthropic": f"sk-ant-api03-{made(93, _URL_SAFE)}AA",
    "Google API key": f"AIza{made(35)}",
    "Google OAuth secret": f"GOCSPX-{made(28, _URL_SAFE)}",
    "Google access token": f"ya29.{made(100, _URL_SAFE)}",
    "Google refresh token": f"1//0{made(60, _URL_SAFE)}",
    "npm": f"npm_{made(36)}",
    "PyPI": f"pypi-AgEIcHlwaS5vcmc{made(150, _URL_SAFE)}",
    "RubyGems": f"rubygems_{made(48, _HEX)}",
    "crates.io": f"cio{made(32)}",
    "Docker Hub": f"dckr_pat_{made(27, _URL_SAFE)}",
    "Hugging Face": f"hf_{made(34)}",
    "Sentry": f"sntrys_{made(120)}_{made(43)}",
    "Supabase": f"sbp_{made(40, _HEX)}",
    "Netlify": f"nfp_{made(36)}",
    "Tailscale": f"tskey-auth-{made(12)}CNTRL-{made(32)}",
    "Figma": f"figd_{made(40, _URL_SAFE)}",
    "Groq": f"gsk_{made(52)}",
    "Replicate": f"r8_{made(37)}",
    "Notion": f"ntn_{made(46)}",
    "Vault": f"hvs.{made(90, _URL_SAFE)}",
    "Vault batch": f"hvb.{made(140, _URL_SAFE)}",
    "Terraform": f"{made(14)}.atlasv1.{made(60, _URL_SAFE)}",
    "DigitalOcean": f"dop_v1_{made(64, _HEX)}",
    "Grafana": f"glsa_{made(32)}_{made(8, _HEX)}",
    "Grafana cloud": f"glc_{made(60)}",
    "Databricks": f"dapi{made(32, _HEX)}",
    "SendGrid": f"SG.{made(22, _URL_SAFE)}.{made(43, _URL_SAFE)}",
    "Mailgun": f"key-{made(32, _HEX)}",
    "Shopify": f"shpat_{made(32, _HEX)}",
    "Square": f"sq0atp-{made(22, _URL_SAFE)}",
    "Linear": f"lin_api_{made(40)}",
    "New Relic": f"NRAK-{made(27, _UPPER)}",
    "age": f"AGE-SECRET-KEY-1{made(58, 'QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L')}",
    "JSON Web Token": f"eyJ{made(20)}.eyJ{made(30)}.{made(43, _URL_SAFE)}",
    "JSON Web Encryption": f"eyJ{made(40)}..{made(16)}.{made(60)}.{made(22)}",
    "NATS seed": f"SUA{made(55, string.ascii_uppercase + '234567')}",
    **{
        f"{kind}private key": f"{kind.join(PEM)}\n{made(64)}\n-----END {kind}PRIVATE KEY-----"
        for kind in ("", "RSA ", "EC ", "DSA ", "OPENSSH ", "ENCRYPTED ")
    },
    "private key in one line": f"{''.join(PEM)}\\n{made(64)}\\n-----END PRIVATE KEY-----",
    "PGP private key": f"-----BEGIN PGP PRIVATE KEY BLOCK-----\n\n{made(64)}\n=aaaa",
    "PuTTY private key": f"PuTTY-User-Key-File-3: ssh-ed25519\nPrivate-Lines: 1\n{made(48)}",
}
_WORDS = st.lists(st.text("abc /:,;'\"", min_size=1, max_size=8), max_size=3)


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("around", ["{}", "a {} b", "url?x={}&y=1", '{{"x": "{}"}}', "/a/{}/b"])
def test_well_known_token_is_found_wherever_it_stands(token: str, around: str) -> None:
    value = around.format(token)

    assert token not in environment((f"HARMLESS={value}",))[0]
    assert token not in arguments((value,))[0]
    assert REDACTED in text(value)


@pytest.mark.parametrize("before", ["DEPLOY_", "old-"])
@pytest.mark.parametrize("kind", ["GitHub ghp_", "GitLab", "AWS access key", "Sentry", "npm"])
def test_well_known_token_is_found_behind_another_name(kind: str, before: str) -> None:
    assert text(f"a {before}{TOKENS[kind]} b") == f"a {before}{REDACTED} b"


@settings(deadline=None)
@given(st.sampled_from([*TOKENS.values()]), _WORDS, _WORDS)
def test_planted_token_never_comes_through(token: str, before: list[str], after: list[str]) -> None:
    planted = " ".join([*before, token, *after])

    assert token not in " ".join(environment((f"X={planted}",)) + arguments(("x", planted)))


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("host=db password=x user=me", f"host=db password={REDACTED} user=me"),
        ("Server=db;Pwd=1 2;Auth_Key=x;A=b", f"Server=db;Pwd={REDACTED};Auth_Key={REDACTED};A=b"),
        ("Pwd=x;Server=db", f"Pwd={REDACTED};Server=db"),
        ("PWD=/home/me make", "PWD=/home/me make"),
        ("host=db password='a b\\'c' user=me", f"host=db password={REDACTED} user=me"),
        ('mysql --password="a b" db', f"mysql --password={REDACTED} db"),
        ("password='never closed, a b", f"password={REDACTED}"),
        ("JAVA_OPTS=-Dpassword=x y", f"JAVA_OPTS=-Dpassword={REDACTED} y"),
        ('OPTS="--token=x y"', f'OPTS="--token={REDACTED} y"'),
        (
            "AccountName=a;AccountKey=bGl2aW5n/A==;EndpointSuffix=core",
            f"AccountName=a;AccountKey={REDACTED};EndpointSuffix=core",
        ),
        ("https://a/b?sv=1&sig=x%3D&se=2", f"https://a/b?sv=1&sig={REDACTED}&se=2"),
        ("https://a/b?X-Amz-Signature=0f&q=1", f"https://a/b?X-Amz-Signature={REDACTED}&q=1"),
        ("postgres://me:p@ss@db/x", f"postgres://{REDACTED}@db/x"),
        ("redis://:x@db:6379/0", f"redis://{REDACTED}@db:6379/0"),
        ("postgres://u:pa/ss@h/db a@b", f"postgres://{REDACTED}@h/db a@b"),
        ("postgres://u:p/a?s#s/@h/db?x=a@b", f"postgres://{REDACTED}@h/db?x=a@b"),
        ("postgres://u:p/a@s@h/v@x", f"postgres://{REDACTED}@h/v@x"),
        ("redis://:1/2@db:6379", f"redis://{REDACTED}@db:6379"),
        ("x://u:123456/7@db", f"x://{REDACTED}@db"),
        ("jdbc:mysql://db/x?user=a&password=b", f"jdbc:mysql://db/x?user=a&password={REDACTED}"),
        ("curl -H 'X-Api-Key: abc d' h", f"curl -H 'X-Api-Key: {REDACTED}' h"),
        ("-H 'Authorization: Basic dTpw'", f"-H 'Authorization: {REDACTED}'"),
        ("user: a\npassword: b c\nport: 1", f"user: a\npassword: {REDACTED}\nport: 1"),
        ("http://h/p?q=1&access_token=x&b=2", f"http://h/p?q=1&access_token={REDACTED}&b=2"),
        ('{"user": "a", "password" : "x\\"y"}', f'{{"user": "a", "password" : "{REDACTED}"}}'),
        ("curl -H 'X: bearer abc' h", f"curl -H 'X: bearer {REDACTED}' h"),
        ("a task-runner, risk-based", "a task-runner, risk-based"),
        ("in sk-learn-contributions-of-all", "in sk-learn-contributions-of-all"),
        ("cache-key-" + "0" * 32, "cache-key-" + "0" * 32),
        ("me:p/w@tcp(db:3306)/x", f"me:{REDACTED}@tcp(db:3306)/x"),
        ("DSN=me:p@w@unix(/s)/x a:b@c", f"DSN=me:{REDACTED}@unix(/s)/x a:b@c"),
        ("user[name]=a&user[password]=b&c=d", f"user[name]=a&user[password]={REDACTED}&c=d"),
        ("user%5Bpassword%5D=b&c=d", f"user%5Bpassword%5D={REDACTED}&c=d"),
        ('{"pwd":"x","port":1}', f'{{"pwd":"{REDACTED}","port":1}}'),
        ('{"PWD":"/home/me"}', '{"PWD":"/home/me"}'),
        ("password=$'a b' db", f"password={REDACTED} db"),
        ("the session: it began, a key: none", "the session: it began, a key: none"),
        ("sent Authorization: Basic dTpw", f"sent Authorization: {REDACTED}"),
        ("a:\n  key: x\n- key: y", f"a:\n  key: {REDACTED}\n- key: {REDACTED}"),
        ("user: a\npassword: 'b c'\nport: 1", f"user: a\npassword: {REDACTED}\nport: 1"),
        ('password: "x y" # z', f"password: {REDACTED} # z"),
        ("a:\n  password: |-\n    x\n\n    y\nb: 1", f"a:\n  password: {REDACTED}\nb: 1"),
        ("password: |x", f"password: {REDACTED}"),
        ("{'user': 'a', 'password': 'x\\'y'}", f"{{'user': 'a', 'password': '{REDACTED}'}}"),
        ("['token' => 'x', 'user' => 'a']", f"['token' => '{REDACTED}', 'user' => 'a']"),
        ('{"password": 12345678, "port": 1}', f'{{"password": {REDACTED}, "port": 1}}'),
        ('{"password":["x","y]"],"port":1}', f'{{"password":{REDACTED},"port":1}}'),
        ('{"password":{"length":8}}', '{"password":{"length":8}}'),
        ('{"password":"","port":1}', '{"password":"","port":1}'),
        ('{"password":"never closed, a', f'{{"password":"{REDACTED}'),
        (
            r'"{\"password\":\"x\\\"y\",\"port\":1}"',
            rf'"{{\"password\":\"{REDACTED}\",\"port\":1}}"',
        ),
        (
            r'"\"{\\\"token\\\":\\\"x\\\",\\\"port\\\":1}\""',
            rf'"\"{{\\\"token\\\":\\\"{REDACTED}\\\",\\\"port\\\":1}}\""',
        ),
        (r'"{\"token\":\"x" b', rf'"{{\"token\":\"{REDACTED}" b'),
        (r'{"run":"db --password=\"a b\" x"}', rf'{{"run":"db --password={REDACTED} x"}}'),
        ("host=db password = x y user=me", f"host=db password = {REDACTED} user=me"),
        ("[db]\npassword = x y\nport = 1", f"[db]\npassword = {REDACTED}\nport = 1"),
        ("as me:password:x at once", f"as me:password:{REDACTED} at once"),
        (
            "auth:8080 key:value a/token:1 Token::new()",
            "auth:8080 key:value a/token:1 Token::new()",
        ),
        ("user=a,password=b,c,port=1", f"user=a,password={REDACTED},port=1"),
        ("password=b, then", f"password={REDACTED}, then"),
        ("db --password x -v, db --token -v", f"db --password {REDACTED} -v, db --token -v"),
        ("db --password 'x y' z", f"db --password {REDACTED} z"),
    ],
)
def test_secrets_in_the_middle_of_text(raw: str, shown: str) -> None:
    assert text(raw) == shown


@pytest.mark.parametrize(
    "url",
    [
        *("https://unpkg.com/react@18/x.js", "http://h:8080/@scope/name", "https://h?by=a@b"),
        *("http://h#a@b", "file:///home/a@b", "file://C:/a@b", "http://[::1]:80/a@b"),
        *("http://[fe80::1%25eth0]/a@b", "mongodb://a:1,b:2,c/db@x", "git+https://h/r.git@v1"),
    ],
)
def test_path_that_holds_an_at_sign_is_no_password(url: str) -> None:
    assert text(f"see {url} there") == f"see {url} there"


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("postgres://user:S3cr", f"postgres://{REDACTED}"),
        ("postgres://user:123", f"postgres://{REDACTED}"),
        ("--url=postgres://user:S3c/r", f"--url=postgres://{REDACTED}"),
        ('{"password":"S3cr', f'{{"password":"{REDACTED}'),
        ("password='S3c r", f"password={REDACTED}"),
        ("use hf_abcdefghijklmnop", f"use {REDACTED}"),
        ("https://db/a/b", "https://db/a/b"),
        ("-cp /lib/a.jar:/lib/b", "-cp /lib/a.jar:/lib/b"),
    ],
)
def test_beginning_of_a_secret_is_one_where_text_was_cut(raw: str, shown: str) -> None:
    assert text(raw, is_cut=True) == shown
    assert arguments(("x", raw), is_cut=True) == ("x", shown)
    assert arguments((raw, "x"), is_cut=True)[0] == text(raw)


PARTS = (
    *(
        "a:=",
        "a:@",
        "a:@tcp",
        "-sk-",
        "_ghp_",
        "a]",
        "%5D",
        "key]=",
        "a key: ",
        "$'",
        "key=$",
        "sk-a" * 9,
    ),
    *("eyJaaaaaaaa-", "-eyJ", "eyJaaaaaaaa.", 'a"b":"', "sk-", "a=", "://", "key='", "key=\\"),
    *("key: ", ";pwd=", "pwd=", "=pwd=", "a://:", "a://b@", "a://b", "a://b:c", "a://b,", "a://[b"),
    *("SG.aaaaaaaaaaaaaaaa.", "0" * 14 + ".", "\\", "key = ", "key = a ", "--key ", '"key":[', "-"),
    *(
        '"key":',
        '\\"key\\":\\"',
        '\\\\"',
        "key=,",
        "key: |\n",
        "\n",
        " ",
        "token:",
        "a" * 31 + "://]",
    ),
)


@pytest.mark.parametrize(
    ("begin", "end"), [("", "@"), ("", "\"'"), ('key="', ""), ("key: '", '"'), ("key=[", "")]
)
@pytest.mark.parametrize("part", PARTS)
def test_hostile_text_costs_as_much_in_one_as_in_pieces(part: str, begin: str, end: str) -> None:
    """What grows with the square costs dozens of times as much."""

    def cost(size: int) -> float:
        """Return the processor time for 16 KiB of a repeated part, in texts of so many bytes."""
        hostile = begin + part * (size // len(part)) + end
        began = time.process_time()
        for _ in range(256 * 64 // size):
            text(hostile)
        return time.process_time() - began

    assert any(cost(256 * 64) < 4 * cost(256) for _ in range(5))


@pytest.fixture
def more() -> Iterator[None]:
    redact.also("^ssn$|kundennr", r"EMP-\d{6}")
    yield
    redact.also("", "")


@pytest.mark.usefixtures("more")
def test_rules_of_this_host_come_on_top() -> None:
    given = ("SSN=1", "KundenNr_2=7", "SSNX=1", "NOTE=of EMP-123456, EMP-12", "DB_PASSWORD=x")

    assert environment(given) == (
        *(f"SSN={REDACTED}", f"KundenNr_2={REDACTED}", "SSNX=1"),
        *(f"NOTE=of {REDACTED}, EMP-12", f"DB_PASSWORD={REDACTED}"),
    )
    assert arguments(("--ssn", "1", "--kundennr=2")) == (
        "--ssn",
        REDACTED,
        f"--kundennr={REDACTED}",
    )


@pytest.fixture
def form(request: pytest.FixtureRequest) -> Iterator[None]:
    redact.also(request.param, request.param)
    yield
    redact.also("", "")


@pytest.mark.parametrize("form", [r"[\w.+-]+@corp\.example"], indirect=True)
@pytest.mark.usefixtures("form")
def test_ordinary_form_costs_as_much_in_one_as_in_pieces() -> None:
    def cost(size: int) -> float:
        began = time.process_time()
        for _ in range(32 * 1024 // size):
            text("a" * size)
            is_secret("a" * size)
        return time.process_time() - began

    assert any(cost(32 * 1024) < 6 * cost(512) for _ in range(5))


@pytest.mark.parametrize("form", [r"(?<!\w)EMP-\w+", r"EMP-[^ ]* ?"], indirect=True)
@pytest.mark.parametrize("before", [0, 200, 250, 256, 508, 511, 512, 700, 2000])
@pytest.mark.parametrize("length", [1, 100, 255, 600, 3000])
@pytest.mark.usefixtures("form")
def test_form_is_found_wherever_it_stands_in_long_text(before: int, length: int) -> None:
    shown = text("." * before + "EMP-" + "x" * length + " " + "." * 999)

    assert "x" not in shown
    assert "EMP" not in shown
    assert shown.count(REDACTED) == 1
    assert shown.startswith("." * before)
    assert shown.endswith("." * 999)


@settings(deadline=None)
@given(st.lists(st.text(max_size=50), max_size=8).map(tuple))
def test_whatever_comes_keeps_its_number(raw: tuple[str, ...]) -> None:
    assert len(arguments(raw)) == len(raw)
    assert len(environment(raw)) == len(raw)
