"""The webhook parser: RFC 8259 to the letter, each alert judged by itself, bytes kept as they are."""

import json
import re

import pytest
from conftest import alert, until
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ts3d

GOOD = {"id": "587c0159a907346eccb84004", "created_at": 1484661065000}


def judged(value):
    (result,) = ts3d.read_webhook(json.dumps(value).encode())
    return result


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"id": None}, "id: "),
        ({"id": 12345}, "id: "),
        ({"id": ["abcd"]}, "id: "),
        ({"id": "abc"}, "4 to 128"),
        ({"id": "a" * 129}, "4 to 128"),
        ({"id": ""}, "4 to 128"),
        ({"id": "a/../../../x"}, "4 to 128"),
        ({"id": "...."}, "4 to 128"),
        ({"id": "abcd%2e"}, "4 to 128"),
        ({"id": "abcd\n"}, "4 to 128"),
        ({"id": "abcd\0"}, "4 to 128"),
        ({"id": "abc\u00e9"}, "4 to 128"),
        ({"id": "\u0661\u0662\u0663\u0664"}, "4 to 128"),
        ({"id": "\ud800\ud800\ud800\ud800"}, "4 to 128"),
        ({"created_at": True}, "created_at: true is neither"),
        ({"created_at": None}, "created_at: null is neither"),
        ({"created_at": [1]}, "created_at: [1] is neither"),
        ({"created_at": {}}, "created_at: {} is neither"),
        ({"created_at": -1}, "created_at: -1 is not within"),
        ({"created_at": 10**30}, "is not within"),
        ({"created_at": 253402300800000}, "is not within"),
        ({"created_at": "253402300800000"}, "is not within"),
        ({"created_at": "9" * 5000}, "is not within"),
        ({"created_at": ""}, "is neither"),
        ({"created_at": " 1459447024000"}, "is neither"),
        ({"created_at": "+1459447024000"}, "is neither"),
        ({"created_at": "1459447024000.5"}, "is neither"),
        ({"created_at": "1_459_447_024_000"}, "is neither"),
        (
            {"created_at": "\u0661\u0664\u0665\u0669\u0664\u0664\u0667\u0660\u0662\u0664\u0660\u0660\u0660"},
            "is neither",
        ),
        ({"created_at": "2017-01-17"}, "is neither"),
        ({"created_at": "2017-01-17T13:51:05"}, "is neither"),
        ({"created_at": "2017-02-29T13:51:05Z"}, "created_at"),
        ({"created_at": "2017-01-17T24:00:00Z"}, "created_at"),
        ({"created_at": "2017-01-17T13:51:61Z"}, "created_at"),
        ({"created_at": "1969-12-31T23:59:59Z"}, "is not within"),
        ({"created_at": "1970-01-01T00:00:00+00:01"}, "is not within"),
        ({"created_at": "9999-12-31T23:59:59-00:01"}, "created_at"),
        ({"created_at": "0000-01-01T00:00:00Z"}, "created_at"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_bad_alert(members, says):
    result = judged(GOOD | members)
    assert isinstance(result, ts3d.Rejected)
    assert says in result.message
    assert next(iter(members)) in result.message
    assert len(result.message) < 300


@pytest.mark.parametrize("missing", ["id", "created_at"])
def test_a_missing_member(missing):
    result = judged({name: value for name, value in GOOD.items() if name != missing})
    assert result.message == f"{missing}: missing"
    assert result.id == (None if missing == "id" else GOOD["id"])


def test_too_many_alerts():
    assert len(ts3d.read_webhook(b'{"alerts": [' + b"0," * (ts3d.MAX_ALERTS - 1) + b"0]}")) == ts3d.MAX_ALERTS
    with pytest.raises(ts3d.Malformed, match="alerts: over 10000"):
        ts3d.read_webhook(b'{"alerts": [' + b"0," * ts3d.MAX_ALERTS + b"0]}")


def test_a_member_there_twice_is_ambiguous():
    for text in (
        b'{"id": "abcd", "id": "abce", "created_at": 0}',
        b'{"\\u0069d": "abcd", "id": "abcd", "created_at": 0}',
    ):
        (result,) = ts3d.read_webhook(text)
        assert result.message == "id: there twice"
    with pytest.raises(ts3d.Malformed, match="alerts: there twice"):
        ts3d.read_webhook(b'{"alerts": [], "alerts": [1]}')


def test_what_is_no_number_names_its_member():
    with pytest.raises(ts3d.Malformed, match="created_at: NaN is no JSON number"):
        ts3d.read_webhook(b'{"alerts": [{"id": "abcd", "created_at": NaN}]}')


def test_escaped_names_and_values_are_read():
    (result,) = ts3d.read_webhook(b'{"\\u0069d": "ab\\u0063d", "created\\u005fat": 0}')
    assert (result.id, result.minute) == ("abcd", "1970/01/01/00/00")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"nonsense",
        b"[]",
        b"null",
        b'"alerts"',
        b'{"alerts": {}}',
        b'{"id": "abcd", "created_at": 0, "alerts": []}',
        b'{"alerts": null}',
        b'{"alerts": []} x',
        b'{"alerts": [],}',
        b'{"alerts": [,]}',
        b"{'alerts': []}",
        b'\xef\xbb\xbf{"alerts": []}',
        b'\xff\xfe{\x00"\x00',
        b'{"alerts": ["\xff"]}',
        b'{"alerts": ["\xed\xa0\x80"]}',
        b'{"alerts": ["\xc0\xaf"]}',
        b'{"alerts": [{"id": "abcd", "created_at": NaN}]}',
        b'{"alerts": [{"id": "abcd", "created_at": -Infinity}]}',
        b'{"alerts": [{"id": "abcd", "created_at": 01}]}',
        b'{"alerts": [{"id": "abcd", "created_at": +1}]}',
        b'{"alerts": [{"id": "abcd", "created_at": 1.}]}',
        b'{"alerts": [{"id": "abcd", "created_at": .1}]}',
        b'{"alerts": [{"id": "abcd", "created_at": 0x1}]}',
        b'{"alerts": [{"id": "abcd\n", "created_at": 1}]}',
        b'{"alerts": ["\\x41"]}',
        b'{"alerts": ["\\u12"]}',
        b'{"alerts": []}\x0c',
        b'{"alerts":\xc2\xa0[]}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"alerts": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=lambda body: repr(body[:40]),
)
def test_no_webhook_at_all(body):
    with pytest.raises(ts3d.Malformed) as error:
        ts3d.read_webhook(body)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "text",
    [
        '\t{ "x" : [ ] ,\r\n %s } ',
        '{"x": "\\ud800 \\u0000 \\"]}", %s}',
        '{"x": -0.0e-0, %s}',
        '{"x": 1e400, %s}',
        '{"x": "\U0001f512\u2028", %s}',
        '{"": {"id": 1, "alerts": [{}]}, %s}',
        '{"x": ' + "9" * 100_000 + ", %s}",
        '{"x": ' + "[" * 100 + "]" * 100 + ", %s}",
        '{"x": 1, "x": 2, %s}',
    ],
    ids=lambda text: text[:20],
)
def test_what_is_allowed_is_kept_byte_for_byte(text):
    members = '"id": "abcd" , "created_at":0'
    text = text % members
    for body in (text, '{"n": [NULL, {"alerts": 1}],"alerts":[%s,%s]}'.replace("NULL", "null") % (text, text)):
        for result in ts3d.read_webhook(body.encode()):
            assert result.body == text.strip(" \t\r\n").encode()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
alerts = st.fixed_dictionaries({"id": values, "created_at": values}) | st.dictionaries(
    st.sampled_from(["id", "created_at", "title"]), values
)


@settings(max_examples=300, deadline=None)
@given(st.lists(values | alerts), st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_any_json_is_judged_alert_by_alert(elements, ascii_only, indent):
    body = json.dumps({"alerts": elements}, ensure_ascii=ascii_only, indent=indent).encode(errors="replace")
    results = ts3d.read_webhook(body)
    assert len(results) == len(elements)
    for element, result in zip(elements, results, strict=True):
        if isinstance(result, ts3d.Arrival):
            assert re.fullmatch("[A-Za-z0-9_-]{4,128}", result.id)
            assert re.fullmatch(r"\d{4}(/\d\d){4}", result.minute)
            assert result.body in body
            assert json.loads(result.body)["id"] == element["id"]
        else:
            assert result.message


@settings(max_examples=500, deadline=None)
@given(st.binary() | st.text().map(str.encode))
@example(b'{"alerts": [{"id": "abcd", "created_at": 1' + b"0" * 5000 + b"}]}")
def test_any_bytes_are_judged(body):
    try:
        expected = json.loads(body.decode(), parse_int=str)
    except (ValueError, RecursionError):
        expected = None
    try:
        ts3d.read_webhook(body)
    except ts3d.Malformed as error:
        assert str(error)
    else:
        assert isinstance(expected, dict)


BODIES = [
    b"",
    b"nonsense",
    b"\xff\x00",
    b'{"alerts": 1}',
    b'{"alerts": [{"id": "a/../../../x", "created_at": 0}]}',
    b'{"id": "abc", "created_at": 0}',
    b'{"alerts": [{"id": "abcd", "created_at": 1e400}, {"id": "abcd", "created_at": true}]}',
]


def test_what_is_refused_is_400_and_kept(daemon, s3, api):
    for body in BODIES:
        status, answer = daemon.post(body)
        assert (status, answer["success"]) == (400, False)
        assert answer["error"]["type"]
        assert answer["error"]["message"]
        for state in answer.get("alerts", []):
            assert state["state"] == "rejected"
            assert state["error"]["message"]
    until(lambda: len(s3.objects()) == len(BODIES))
    assert sorted(s3.objects("rejected/").values()) == sorted(BODIES)
    assert api.calls == []


def test_nesting_of_any_depth_is_answered(daemon, s3):
    """At one exact depth the whole can be decoded and its parts, from a deeper stack, cannot."""
    bodies = [
        b'{"id": "abcd", "created_at": 0, "x": ' + b"[" * depth + b"]" * depth + b"}"
        for depth in [*range(960, 1010), *range(9_960, 10_010), 100_000]
    ]
    for body in bodies:
        assert daemon.post(body)[0] in (200, 400), len(body)
    until(lambda: daemon.health()["queued"] == 0)
    assert len(s3.objects("rejected/")) + len(s3.objects("webhooks/")) >= 1


def test_a_refused_webhook_is_kept_while_s3_is_away(new_daemon, s3):
    daemon = new_daemon()
    s3.stop()
    assert daemon.post(BODIES[1])[0] == 400
    daemon.kill()
    s3.start()
    daemon.start()
    until(lambda: list(s3.objects("rejected/").values()) == [BODIES[1]])


def test_a_large_webhook(daemon, s3):
    big = [alert(n, text="x" * 1_000_000) for n in range(7)]
    answer = daemon.post({"alerts": big})[1]
    assert {a["state"] for a in answer["alerts"]} <= {"archived", "queued"}
    until(lambda: len(s3.objects("alerts/")) == 7)
