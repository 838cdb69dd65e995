import pytest

from nbdserve.settings import TraceSettings
from nbdserve.trace import EVENTS, Tracer, selected, unknown


def test_patterns_choose_and_take_away():
    assert selected([]) == set()
    assert selected(["nbd_request"]) == {"nbd_request"}
    assert selected(["*"]) == set(EVENTS)
    assert selected(["*", "-nbd_*"]) == {name for name in EVENTS if not name.startswith("nbd_")}
    assert selected(["-*", "nbd_reply"]) == {"nbd_reply"}


def test_a_plain_name_that_no_event_has():
    assert unknown("nbd_requets")
    assert unknown("-nbd_requets")
    assert not unknown("nbd_request")
    assert not unknown("nosuch*")


def test_only_wanted_events_are_passed_on():
    trace, seen = Tracer(), []
    assert not trace.enabled
    trace.enable(["nbd_request"], lambda name, **fields: seen.append((name, fields)))
    assert trace.enabled
    trace("nbd_reply", cookie=1)
    trace("nbd_request", cookie=2)
    assert seen == [("nbd_request", {"cookie": 2})]
    trace.enable([], print)
    assert not trace.enabled


def test_an_event_without_a_row_is_our_mistake():
    with pytest.raises(AssertionError, match="nbd_nosuch"):
        Tracer()("nbd_nosuch")


def test_events_are_written_as_lines(tmp_path, monkeypatch):
    from nbdserve import tracing

    trace, warnings = Tracer(), []
    monkeypatch.setattr(tracing, "trace", trace)
    log = tmp_path / "log"
    settings = TraceSettings(("nbd_reply", "nosuch"), str(log))
    stream = tracing.set_up(settings, warn=warnings.append)
    trace("nbd_reply", cookie=7)
    trace("nbd_request", cookie=8)
    stream.close()
    [line] = log.read_text().splitlines()
    assert "event=nbd_reply cookie=7" in line
    assert warnings == ["trace event 'nosuch' does not exist"]


def test_what_the_server_tells_is_traced_and_its_errors_are_shown(monkeypatch, capsys):
    from nbdserve import tracing

    trace, seen = Tracer(), []
    monkeypatch.setattr(tracing, "trace", trace)
    log = tracing.Log()
    log.debug("nbd_client_closed", reason="it was time")
    trace.enable(["nbd_client_closed"], lambda name, **fields: seen.append((name, fields)))
    log.debug("nbd_client_closed", reason="it was time")
    assert seen == [("nbd_client_closed", {"reason": "it was time"})]
    log.error("a client's connection failed")
    assert 'event="a client\'s connection failed"' in capsys.readouterr().err
