"""Who may read what the agent serves."""

import os

import pytest

from ckptsvc.agent.http import access as http_access
from ckptsvc.agent.http.access import Access, http_token, sign_in
from ckptsvc.agent.http.httpd import Request
from ckptsvc.config import load
from ckptsvc.errors import ConfigError

TOKEN = "correct-horse-battery"


def request(**headers):
    return Request("GET", "/", {}, {"host": "127.0.0.1:9464"} | headers)


@pytest.fixture
def access():
    return Access(TOKEN, 9464, "127.0.0.1", encrypted=False)


class TestDoor:
    def test_programs_show_the_token(self, access):
        assert access.is_known(request(authorization=f"Bearer {TOKEN}"))
        assert access.is_known(request(authorization=f"bearer  {TOKEN} "))
        for wrong in ("Bearer", "Bearer ", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer \xff"):
            assert not access.is_known(request(authorization=wrong))
        assert not access.is_known(request())

    def test_a_browser_shows_its_cookie(self, access):
        name, value = access.set_cookie()
        pair, _, attributes = value.partition("; ")
        assert name == "Set-Cookie"
        assert pair.startswith("ckptsvc-9464=")
        assert attributes == f"Max-Age={http_access.SESSION}; Path=/; HttpOnly; SameSite=Strict"
        assert TOKEN not in value
        assert access.is_known(request(cookie=f"other=1; {pair}"))
        for wrong in (
            pair[:-1],
            pair.replace("=1", "=2"),
            "ckptsvc-9464=",
            "ckptsvc-9464=x.y",
            pair.replace("9464", "1"),
        ):
            assert not access.is_known(request(cookie=wrong))

    def test_a_wrong_token_is_not_mended_by_a_good_cookie(self, access):
        pair = access.set_cookie()[1].split(";")[0]
        assert not access.is_known(request(cookie=pair, authorization="Bearer x"))

    def test_a_scraper_has_a_token_of_its_own_for_the_metrics_and_nothing_else(self, access):
        def asks(path, **query):
            return access.may_scrape(Request("GET", path, query, {"host": "127.0.0.1:9464"}))

        assert not asks("/metrics", scrape="")  # nobody has told the agent of any
        access.scrape = "another-token"
        assert asks("/metrics", scrape="another-token")
        assert not any(asks(path, scrape="another-token") for path in ("/", "/status.json", "/events", "/metrics/"))
        assert not asks("/metrics")
        assert not any(asks("/metrics", scrape=wrong) for wrong in (TOKEN, "", "another-token "))
        assert not access.is_token("another-token")
        assert not access.is_known(request(authorization="Bearer another-token"))

    def test_a_cookie_ends(self):
        now = [1000.0]
        access = Access(TOKEN, 1, "127.0.0.1", encrypted=True, clock=lambda: now[0])
        value = access.set_cookie()[1]
        assert value.endswith("; Secure")
        pair = value.split(";")[0]
        now[0] += http_access.SESSION - 1
        assert access.is_known(request(cookie=pair))
        now[0] += 2
        assert not access.is_known(request(cookie=pair))

    def test_a_cookie_is_good_for_one_port_and_one_token(self, access):
        pair = access.set_cookie()[1].split(";")[0]
        other = Access(TOKEN, 9465, "127.0.0.1", encrypted=False)
        assert not other.is_known(request(cookie=pair.replace("9464", "9465")))
        assert not Access("another token altogether", 9464, "127.0.0.1", encrypted=False).is_known(request(cookie=pair))

    def test_names_that_others_can_point_here_are_none_of_ours(self, access):
        for host in ("127.0.0.1:9464", "localhost:8080", "[::1]:9464", "192.0.2.7", "LOCALHOST", os.uname().nodename):
            assert access.is_for_us(request(host=host)), host
        for host in (
            "",
            "rebind.example",
            "127.0.0.1.rebind.example",
            "localhost.example:9464",
            "a b",
            "[::1",
            "@127.0.0.1",
        ):
            assert not access.is_for_us(request(host=host)), host

    def test_a_token_is_escaped_in_an_address(self):
        assert sign_in("http://h:1", "a+b/c&d") == "http://h:1/?token=a%2Bb%2Fc%26d"


class TestToken:
    @pytest.fixture
    def environ(self, tmp_path):
        folder = tmp_path / "run"
        folder.mkdir(mode=0o700)
        return {"CKPTSVC_AGENT_SOCKET_DIR": str(folder), "HOME": str(tmp_path)}

    def read(self, environ):
        return http_token(load(environ, files=[]), environ)

    def test_it_is_made_once_and_for_its_owner_alone(self, environ, tmp_path):
        first = self.read(environ)
        assert len(first) == 64
        assert self.read(environ) == first
        assert (tmp_path / "run" / "http-token").stat().st_mode & 0o777 == 0o600
        assert not (tmp_path / "run" / "secret").exists()

    def test_a_setting_names_another_which_a_group_may_read(self, environ, tmp_path):
        file = tmp_path / "token"
        file.write_text(f"{TOKEN}\n")
        file.chmod(0o640)
        environ["CKPTSVC_AGENT_HTTP_TOKEN_FILE"] = str(file)
        assert self.read(environ) == TOKEN
        assert not (tmp_path / "run" / "http-token").exists()

    @pytest.mark.parametrize("mode", [0o644, 0o660, 0o602])
    def test_one_that_others_can_read_or_change_is_refused(self, environ, tmp_path, mode):
        file = tmp_path / "token"
        file.write_text(TOKEN)
        file.chmod(mode)
        environ["CKPTSVC_AGENT_HTTP_TOKEN_FILE"] = str(file)
        with pytest.raises(ConfigError, match="read by everybody"):
            self.read(environ)

    @pytest.mark.parametrize("text", ["", "short", "two words, and long enough", "x" * 600])
    def test_what_is_no_token(self, environ, tmp_path, text):
        file = tmp_path / "token"
        file.write_text(text)
        file.chmod(0o600)
        environ["CKPTSVC_AGENT_HTTP_TOKEN_FILE"] = str(file)
        with pytest.raises(ConfigError, match="holds no token"):
            self.read(environ)

    def test_no_file(self, environ, tmp_path):
        environ["CKPTSVC_AGENT_HTTP_TOKEN_FILE"] = str(tmp_path / "none")
        with pytest.raises(ConfigError, match="No such file") as caught:
            self.read(environ)
        assert "openssl rand" in caught.value.hint
        environ["CKPTSVC_AGENT_HTTP_TOKEN_FILE"] = "relative"
        with pytest.raises(ConfigError, match="not an absolute path"):
            self.read(environ)
