"""The webhook parser: RFC 8259 to the letter, each alert judged by itself, bytes kept as they are."""

import contextlib
import json
import sqlite3
import time

import pytest
from conftest import alert, until
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_fuzz import bodies, judge

import ts3d

GOOD = {"id": "587c0159a907346eccb84004", "created_at": 1484661065000}


BAD = [  # members of an alert, and what the message says of the first of them
    *(({"id": id_}, "4 to 128") for id_ in (None, 12345, ["abcd"], "abc", "a" * 129, "", "....", "abcd%2e", "abcd\n")),
    *(({"id": id_}, "4 to 128") for id_ in ("a/../../../x", "abcd\0", "abc\u00e9", "\u0661\u0662\u0663\u0664")),
    ({"id": "\ud800\ud800\ud800\ud800"}, "4 to 128"),
    ({"created_at": True}, "true"),
    ({"created_at": None}, "null"),
    ({"created_at": [1]}, "[1]"),
    ({"created_at": {}}, "{}"),
    *(
        ({"created_at": value}, "1970 to 9999")
        for value in (-1, 10**30, 253402300800000, "253402300800000", "9" * 5000)
    ),
    *(({"created_at": value}, "1970 to 9999") for value in ("1969-12-31T23:59:59Z", "1970-01-01T00:00:00+00:01")),
    *(({"created_at": value}, "created_at") for value in ("", " 1459447024000", "+1459447024000", "1459447024000.5")),
]


def test_bad_alerts(new_daemon):
    """The message names the member and the cause, and quotes little."""
    daemon = new_daemon(archive__workers="0")
    for name in GOOD:
        status, answer = daemon.post({key: value for key, value in GOOD.items() if key != name})
        assert status == 400
        assert answer["alerts"][0]["error"]["message"].startswith(f"{name}: missing")
        assert answer["alerts"][0].get("id") == (None if name == "id" else GOOD["id"])
    status, answer = daemon.post({"alerts": [GOOD | members for members, _ in BAD]})
    assert (status, answer["success"]) == (400, False)
    for (members, says), alert_ in zip(BAD, answer["alerts"], strict=True):
        assert alert_["state"] == "rejected"
        message = alert_["error"]["message"]
        assert says in message, (members, message)
        assert next(iter(members)) in message
        assert len(message) < 300


def texts(*values):
    return [f'"{value}"' for value in values]


CREATED_AT = {  # minutes, and the literals that mean them; None: rejected
    "1970/01/01/00/00": [
        *("0", "-0", "-0.0e5", "1.5", "59.999", "0e999999999", "1e-999999999", "0." + "0" * 100_000 + "1"),
        *texts("1970-01-01T00:00:00Z", "0", "000000000000000000059"),
    ],
    "1970/01/01/00/01": ["6e1", "6000E-2", '"60"'],
    # Seconds below 10^11, from there on milliseconds.
    "2025/11/28/03/20": '1764300000 1764300000.999 1.7643e9 "1764300000" 1764300000000 "1764300000000"'.split(),
    "5138/11/16/09/46": ["99999999999", "99999999999.9", '"99999999999"'],
    "1973/03/03/09/46": ["100000000000", "1e11", '"100000000000"'],
    "2001/09/09/01/46": ["1000000000", "1" + "0" * 100_000 + "e-99988"],
    "9999/12/31/23/59": [
        "253402300799999",
        *texts("253402300799999", "9999-12-31T23:59:59.999Z", "9999-12-31T23:59:60Z"),
    ],
    "2017/01/17/13/51": [
        *("1484661065000", "1.484661065e+12", "14846610650000000000000e-10", "1484661065000." + "9" * 100_000),
        *texts("1484661065000", "\\u0031484661065000", "0001484661065000", "2017-01-17T13:51:05\\u005a"),
        *texts("2017-01-17T13:51:05Z", "2017-01-17t13:51:05z", "2017-01-17 13:51:05Z", "2017-01-17T13:51:05-00:00"),
        *texts("2017-01-17T13:51:05.123456789012345678901234567890Z", "2017-01-17T13:51:05.9+00:00"),
        # UTC without a zone, and zones in every form of ISO 8601
        *texts("2017-01-17T13:51:05", "2017-01-17 13:51:05.5", "2017-01-17T13:51", "2017-01-17T13:51:05+0000"),
        *texts("2017-01-17T13:51:05+00", "2017-01-17T14:51:05+01", "2017-01-17T05:51:05-0800", "2017-01-17T19:21+0530"),
        *texts("2017-01-18T13:50:05+23:59", "2017-01-16T13:52:05-23:59", "2017-01-17t15:51:05.123456789+02:00"),
    ],
    "2016/12/31/23/59": texts("2016-12-31T23:59:60Z", "2016-12-31T15:59:60-08:00", "2016-12-31T23:59:60.5"),
    "2016/02/29/00/00": texts("2016-02-29T00:00:00Z", "2016-02-29T00:00:00"),
    None: [
        *("253402300800000", "-1", "-0.5", "1E400", "-1E400", "1e999999999", "1e" + "9" * 100_000, "9" * 100_000),
        *("-" + "9" * 100_000, '"' + "9" * 100_000 + '"', '{"created_at": 0}'),
        *"true false null [] [0] {}".split(),
        *texts("1e3", "1.5", "-0", "-1", "0x10", "1 ", "1\\n", "NaN", "Infinity", "null", "", "1\\u0000"),
        *texts("١٤٨٤", "१४८४", "１４８４", "²", "Ⅷ", "1４84", "\\u0661\\u0664"),
        *texts("2017-02-30T00:00:00Z", "2017-02-29T00:00:00", "2017-13-01T00:00:00Z", "2017-00-01T00:00:00Z"),
        *texts("2017-01-00T00:00:00Z", "2017-01-32T00:00:00Z", "0000-01-01T00:00:00Z", "2017-01-17T25:00:00Z"),
        *texts("2017-01-17T13:60:00Z", "2017-01-17T13:51:61Z", "2017-01-17T13:51:05+24:00", "2017-01-17T13:51:05+1:00"),
        *texts("17-01-17T13:51:05Z", "2017-1-17T13:51:05Z", "+2017-01-17T13:51:05Z", "12017-01-17T13:51:05Z"),
        *texts(" 2017-01-17T13:51:05Z", "2017-01-17T13:51:05Z ", "2017-01-17T13:51:05Z\\n", "2017-01-17T13:51:05ZZ"),
        *texts("٢٠١٧-01-17T13:51:05Z", "2017-01-17T1３:51:05Z", "2017-01-17T13:51:0５Z", "2017-01-17T13:51:05.５Z"),
        *texts("2017−01−17T13:51:05Z", "2017-01-17T13:51:05−01:00", "-2017-01-17T13:51:05Z", "2017-01-17T13:51:05 CET"),
        *texts("1969-12-31T23:59:59", "9999-12-31T23:59:59-00:01", "0001-01-01T00:00:00+00:01"),
    ],
}


def test_created_at(new_daemon, s3):
    daemon = new_daemon(archive__workers="24", server__wait="0")
    cases = [(minute, text) for minute, values_ in CREATED_AT.items() for text in values_]
    ids = [f"case-{n:04}" for n in range(len(cases))]
    body = ",".join(f'{{"id": "{id_}", "created_at": {text}}}' for id_, (_, text) in zip(ids, cases, strict=True))
    status, answer = daemon.post(f'{{"alerts": [{body}]}}'.encode())
    assert status == 200
    keys = set()
    for id_, (minute, text), alert_ in zip(ids, cases, answer["alerts"], strict=True):
        assert (alert_["id"], alert_["state"] == "rejected") == (id_, minute is None), (text[:60], alert_)
        if minute:
            keys.add(f"webhooks/{minute}/{id_}")
        else:
            assert "created_at: " in alert_["error"]["message"]
            assert len(alert_["error"]["message"]) < 300
    until(lambda: len(s3.objects("alerts/")) == len(keys))
    assert set(s3.objects("webhooks/")) == keys


def test_too_many_alerts():
    assert len(ts3d.read_webhook(b'{"alerts": [' + b"0," * (ts3d.MAX_ALERTS - 1) + b"0]}")) == ts3d.MAX_ALERTS
    with pytest.raises(ts3d.Malformed, match="alerts: over 10000"):
        ts3d.read_webhook(b'{"alerts": [' + b"0," * ts3d.MAX_ALERTS + b"0]}")


def test_a_member_there_twice_is_ambiguous():
    for text in (
        b'{"id": "abcd", "id": "abce", "created_at": 0}',
        b'{"\\u0069d": "abcd", "id": "abcd", "created_at": 0}',
        b'{"i\\u0064": "abcd", "created_at": 0, "\\u0069\\u0064": 1}',
        b'{"id": "abcd", "created_at": 0, "\\u0069d": null}',
    ):
        (result,) = ts3d.read_webhook(text)
        assert result.error_message == "id: there twice"
    (result,) = ts3d.read_webhook(b'{"id": "abcd", "created_at": 0, "created\\u005Fat": 0}')
    assert result.error_message == "created_at: there twice"
    for name in (b"alerts", b"\\u0061lerts", b"alert\\u0073"):
        with pytest.raises(ts3d.Malformed, match="alerts: there twice"):
            ts3d.read_webhook(b'{"alerts": [], "%s": [1]}' % name)
    with pytest.raises(ts3d.Malformed, match="one alert"):
        ts3d.read_webhook(b'{"\\u0069d": "abcd", "created_at": 0, "\\u0061lerts": []}')
    other = (
        b'{"id": "abcd", "created_at": 0, "Id": 1, "ID": 2, "id\\u0000": 3, "\\ufeffid": 4, "x": {"id": 5, "id": 6}}'
    )
    assert ts3d.read_webhook(other)[0].body == other


def test_what_is_no_number_names_its_member():
    with pytest.raises(ts3d.Malformed, match="created_at: NaN is "):
        ts3d.read_webhook(b'{"alerts": [{"id": "abcd", "created_at": NaN}]}')


def test_escaped_names_and_values_are_read():
    (result,) = ts3d.read_webhook(b'{"\\u0069d": "ab\\u0063d", "created\\u005fat": 0}')
    assert (result.id, result.minute) == ("abcd", "1970/01/01/00/00")


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b" ", b"{}", b"[]", b"null", b'"alerts"', b'{"alerts": {}}', b'{"alerts": null}', b'{"alerts": []} x'),
        *(b'{"id": "abcd", "created_at": 0, "alerts": []}', b'{"alerts": []}\x0c', b'{"alerts":\xc2\xa0[]}'),
        b'{"alerts": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=lambda body: repr(body[:40]),
)
def test_no_webhook_at_all(body):
    with pytest.raises(ts3d.Malformed) as error:
        results = ts3d.read_webhook(body)
        raise ts3d.Malformed(results[0].error_message)
    assert len(str(error.value)) < 200


# RFC 8259: what may stand in the place of a value, …
ALLOWED = [
    # literals, numbers
    *("null", "true", "false", "0", "-0", "1", "-1", "10", "123456789012345678901234567890", "0.0", "-0.0", "0.1e1"),
    *"1e1 1E1 1e+1 1e-1 1E+01 0e0 0E-0 -0e+0 1.0E+2 1e400 -1E400 1e-400 1e999999999".split(),
    *("1.797693134862315808e308", "0." + "3" * 400, "-" + "9" * 5000, "9" * 100_000, "-1." + "9" * 100_000),
    *("1e" + "9" * 100_000, "0e-" + "0" * 100_000),
    # strings
    *r'"" "a" "\"" "\\" "\/" "/" "\b\f\n\r\t" "\u0000" "\u001F" "\u0022"'.split(),
    *('" "',),
    *('"\\u005C"', '"\\uAbCd"', '"\\ud83d\\ude00"', '"\\uD83D\\uDE00"', '"\x7f"', '"\x80"', '"\x85"', '"\u2028\u2029"'),
    *r'"é" "🔒" "\\u0000" "\\\""'.split(),
    *('"\ufeff"', '"\ufffe"', '"\uffff"', '"\ufdd0"', '"\ue000"', '"\U0010ffff"'),
    *('"[{\\"id\\": 1}]"', '"]}"', '"//"', '"/**/"', '"' + "x" * 100_000 + '"', '"' + "\\u0000" * 1000 + '"'),
    # lone surrogates, escaped: "unpredictable", and allowed (section 8.2)
    *r'"\ud800" "\udfff" "\ud800\ud800" "\ude00\ud83d" "\ud83dx\ude00" "\ud800\n" "a\uDC00"'.split(),
    # arrays, objects, blanks
    *"[] [[]] [null] [1,2] [[[]]]".split(),
    *("[ ]", "[\t\n\r ]", "[ 1 , 2 ]", "[\n1\n,\r2]", '[[], {}, "", 0, [null]]'),
    *'{} {"a":1} {"":0} {"a":{"a":{}}} {"a":1,"a":2} {"a":1,"a":1}'.split(),
    *("{ }", "{\t\n\r }", '{ "a" : 1 , "b" : 2 }'),
    *r'{"\u0000":0} {"\ud800":0} {"\ud800":{"\udc00":"\ud800"}} {"a\"]}":0} {"alerts":[{}]}'.split(),
    *('{"\ufeff":0}',),
    *('{"é":1,"e\u0301":2}', '{"__proto__":{}}', '{"id":1,"\\u0069d":2,"created_at":NULL}'.replace("NULL", "null")),
    *("[" * 500 + "]" * 500, '{"a":' * 400 + "0" + "}" * 400, "[" + "[],{}," * 1000 + "0]"),
]
# … and what may not.
FORBIDDEN = [
    # literals, numbers
    *r"nul nulll Null NULL True TRUE tru fals undefined None nil a é 🔒 \u0061".split(),
    *("",),
    *"NaN -NaN nan Infinity -Infinity +Infinity inf Inf -inf 01 -01 00 -00 +1 ++1 +0".split(),
    *"- --1 .1 -.1 1. -1. 1.e1 . 1e 1e+ 1e- 1E e1 1ee1 1e1.5 1.1.1".split(),
    *("- 1", "1 000"),
    *"0x1 0X1 0b1 0o1 1_000 1, 1a 1f 1L 1n 0e 0.e1 1e1e1".split(),
    *("1e 1", "1 .5", "9" * 100_000 + "."),
    *("\u0661", "\uff11", "1\u0661", "-\uff11", "²", "1²", "½", "−1", "1e\uff11", "1.\u0661", "∞"),
    # strings
    *r'''" "a 'a' '' `a` "\" "\ "\a" "\v" "\0" "\1" "\x41" "\'" "\U00000041"'''.split(),
    *r'"\u" "\u0" "\u00" "\u004" "\u004g" "\u+041" "\u-041" "\u0_41" "\u{41}"'.split(),
    *('"\\u 041"',),
    *r'"\u004１" "\u٠٠٤١" "\ud800\u" "\ud800\udc0" "\é" "a""b"'.split(),
    *('"\\\n"', '"a" "b"'),
    *(f'"{chr(control)}"' for control in range(32)),
    *(f"[{chr(control)}]" for control in range(32) if chr(control) not in "\t\n\r"),
    *('"\\\x00"', '{"\x00":0}', '{"a\x1f":0}', '"a\x00b"', "\x00", "1\x00", "nu\x00ll"),
    # arrays, objects, blanks
    *'[ ] [[ []] [,] [1,] [,1] [1,,2] [1;2] [1:2] ["a":1] [1 [1, (1) [1) [1}'.split(),
    *("[1 2]",),
    *'{ } {{}} {}} {,} {"a"} {"a":} {"a"::1} {"a",1} {"a":1,} {,"a":1} {"a":1,,"b":2}'.split(),
    *('{"a" 1}',),
    *"""{"a":1 {"a": {"a" {"a":1] {a:1} {'a':1} {1:1} {null:1} {[]:1} {"a":1;"b":2} {:1}""".split(),
    *('{"a":1 "b":2}',),
    *r'{"a"=1} {"a":1:2} {...} [...] /**/1 1/**/ <a> * [*] [\n] @ $'.split(),
    *("//\n1", "# 1", "1 // 1"),
    *("\xa0" + "1", "1\x0c", "\x0b1", "\u20031", "1\u2028", "\u20601", "\ufeff1", "1\ufeff", "[\ufeff]"),
    *('{\ufeff"a":1}', "\x851", "[" * 100_000, "]" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000),
    '[{"a":' * 50_000 + "0" + "}]" * 50_000,
]
PLACES = [  # beside, in an alert, deeper in it, in a bare one
    '{"x": %s, "alerts": [{"id": "abcd", "created_at": 0}]}',
    '{"alerts": [{"id": "abcd", "created_at": 0, "x": %s}]}',
    '{"alerts": [{"x": [{"y": %s}], "id": "abcd", "created_at": 0}], "n": 0}',
    '\r\n{"id": "abcd", "x":\t%s , "created_at": 0}\t',
    '\t{ "x" : %s ,\r\n"id": "abcd" , "created_at":0, "x": {"id": 1, "alerts": [{}]} } ',
]
INVALID_UTF_8 = [
    *(b"\xff", b"\xfe", b"\x80", b"\xbf", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x94", b"\xc0\xaf", b"\xe0\x80\xaf"),
    *(b"\xf0\x80\x80\xaf", b"\xf8\x88\x80\x80\x80", b"\xf4\x90\x80\x80", b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xe9"),
    *(b"\xed\xa0\xbd\xed\xb8\x80", b"\xc0\x80", b"\xf5\x80\x80\x80"),
]


def short(value):
    return repr(value)[:80]


def test_what_rfc_8259_allows_is_taken_and_kept_byte_for_byte():
    begin = time.monotonic()
    for value in ALLOWED:
        for place in PLACES:
            body = (place % value).encode()
            (result,) = ts3d.read_webhook(body)
            assert not result.error_type, short(value)
            assert result.body in body, short(value)
            assert value.encode() in result.body or place == PLACES[0], short(value)
            assert result.body[:1] + result.body[-1:] == b"{}"
        results = ts3d.read_webhook(f'{{"alerts": [0, {value}, {{"id": "abcd", "created_at": 0}} ]}}'.encode())
        assert [result.id for result in results] == ["", "", "abcd"], short(value)
        assert results[2].body == b'{"id": "abcd", "created_at": 0}'
        try:
            ts3d.read_webhook(value.encode())  # JSON, if no webhook
        except ts3d.Malformed as error:
            assert "not JSON" not in str(error), short(value)
    assert time.monotonic() - begin < 20


def test_what_rfc_8259_forbids_is_refused():
    begin = time.monotonic()
    for value in FORBIDDEN:
        for place in (*PLACES, "%s", '{"alerts": [{"id": "abcd", "created_at": 0}, %s]}'):
            with pytest.raises(ts3d.Malformed, match="not JSON"):
                raise AssertionError((short(value), place, ts3d.read_webhook((place % value).encode())))
    assert time.monotonic() - begin < 20


def test_what_is_not_utf_8_is_refused():
    for scrap in INVALID_UTF_8:
        for place in (*PLACES, '{"id": %s, "created_at": 0}', '{%s: 0, "id": "abcd", "created_at": 0}'):
            with pytest.raises(ts3d.Malformed, match=r"not JSON: byte \d+ is not UTF-8"):
                ts3d.read_webhook(place.encode().replace(b"%s", b'"' + scrap + b'"'))
    text = PLACES[1] % 0
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "utf-8-sig"):
        for body in (text.encode(encoding), (PLACES[1] % '"é"').encode(encoding)):
            with pytest.raises(ts3d.Malformed, match="not JSON"):
                ts3d.read_webhook(body)


@pytest.mark.parametrize("depth", [900, 990, 5000, 100_000, 1_000_000])
def test_nesting_is_judged_at_once_wherever_it_is(depth):
    begin = time.monotonic()
    for text in ("[" * depth + "]" * depth, '{"alerts":' * (depth // 2) + "0" + "}" * (depth // 2)):
        for place in (
            *(*PLACES, "%s", '{"alerts": %s}', '{"alerts": [%s]}', '{"id": %s, "created_at": 0}'),
            *('{"id": "abcd", "created_at": %s}', '{"alerts": [], "alerts": %s}', '{"alerts": [0, {"id": [%s]}]}'),
        ):
            body = (place % text).encode()
            try:
                results = ts3d.read_webhook(body)
            except (ts3d.Malformed, RecursionError) as error:
                assert depth > 800 and len(str(error)) < 200
            else:
                assert all(result.body in body for result in results)
                assert depth < 100_000
    assert time.monotonic() - begin < 10


def test_long_numbers_cost_no_more_than_long_strings():
    """int() of 100,000 digits takes time with their square, and Python refuses it."""
    digits = "9" * 100_000
    for value in (digits, f"-{digits}", f"0.{digits}", f"1e{digits}", f"1e-{digits}", f"{digits}.{digits}E+{digits}"):
        begin = time.monotonic()
        for place in (*PLACES, '{"id": "abcd", "created_at": %s}', '{"id": %s, "created_at": 0}', '{"alerts": [%s]}'):
            (result,) = ts3d.read_webhook((place % value).encode())
            assert len(result.error_message or "") < 200
        assert time.monotonic() - begin < 2


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=4,
)


@st.composite
def encoded(draw):
    """A webhook of an alert whose members are any JSON, or of any JSON instead of an alert."""
    value, elements = draw(values), [draw(values), {"id": draw(values), "created_at": draw(values), "title": None}]
    elements = draw(st.sampled_from([elements, elements[:1], value]))
    return json.dumps({"alerts": elements}, ensure_ascii=draw(st.booleans())).encode(errors="replace")


@settings(max_examples=500, deadline=None)
@given(bodies() | st.binary() | encoded())
@example(b'{"alerts": [{"id": "abcd", "created_at": 1' + b"0" * 5000 + b"}]}")
def test_any_body_is_judged_alert_by_alert(body):
    judge(body)


def test_what_is_refused_is_400_and_kept(daemon, s3, api):
    """Also while S3 is unavailable, and over a kill."""
    good = PLACES[1] % 0
    refused = {
        body: "malformed_webhook"
        for body in (
            *(b"", b"nonsense", b"\xff\x00", b"\0", b"\0" * 1000, b'{"alerts": 1}', b'{"\xed\xa0\x80": 0}'),
            *(good.encode("utf-16"), good.encode() + b"\0"),
            *(b"\xef\xbb\xbf" + rest for rest in (good.encode(), b"", b"{}")),
            *(PLACES[0].encode().replace(b"%s", b'"' + scrap + b'"') for scrap in INVALID_UTF_8),
        )
    }
    refused |= {
        b'{"id": "abc", "created_at": 0}': "invalid_alert",
        b'{"alerts": [{"id": "a/../../../x", "created_at": 0}]}': "invalid_alert",
        b'{"alerts": [{"id": "abcd", "created_at": 1e400}, {"id": "abcd", "created_at": true}]}': "invalid_alert",
    }
    s3.stop()
    for body, type_ in refused.items():
        status, answer = daemon.post(body)
        assert (status, answer["success"], answer["error"]["type"]) == (400, False, type_), body
        assert 0 < len(answer["error"]["message"]) < 200
        for state in answer.get("alerts", []):
            assert state["state"] == "rejected"
            assert state["error"]["message"]
    daemon.kill()
    s3.start()
    daemon.start()
    until(lambda: len(s3.objects()) == len(refused))
    assert sorted(s3.objects("rejected/").values()) == sorted(refused)
    assert api.calls == []


def test_what_rfc_8259_allows_is_in_s3_byte_for_byte(new_daemon, s3):
    daemon = new_daemon(archive__workers="24", server__wait="0")
    values = [value for value in ALLOWED if len(value) < 10_000]
    texts = {
        f"json-{n:04}": f'{{ "x":{value} , "id" :\t"json-{n:04}", "created_at": {1484661065000 + n} }}'
        for n, value in enumerate(values)
    }
    status, answer = daemon.post(('{"alerts":[' + ",\r\n ".join(texts.values()) + "]}").encode())
    assert status == 200
    assert [state["id"] for state in answer["alerts"]] == list(texts)
    until(lambda: len(s3.objects("alerts/")) == len(texts))
    kept = {key.rpartition("/")[2]: body.decode() for key, body in s3.objects("webhooks/").items()}
    assert kept == texts


def test_surrogates_and_nul_in_an_id_are_answered(new_daemon):
    """What no UTF-8 can hold: the answer escapes it, and neither the log nor the queue breaks."""
    daemon = new_daemon(archive__workers="0", log__level="DEBUG")
    values = r"\ud800 abcd\ud800 \udc00abcd abcd\u0000 \u0000abcd ab\u0000cd \ud800\u0000".split()
    for value in values:
        body = b'{"alerts": [{"id": "VALUE", "created_at": 0}, {"id": "abcd", "created_at": "VALUE"}]}'
        body = body.replace(b"VALUE", value.encode())
        status, answer = daemon.post(body)
        assert status == 400
        assert [state["id"] for state in answer["alerts"]] == [json.loads(f'"{value}"'), "abcd"]
        assert value in answer["alerts"][1]["error"]["message"]
    names = b'{"id": "abcd", "created_at": 0, "\\ud800": "\\u0000", "\\u0000id": "\\udfff", "id\\ud800": 0}'
    assert daemon.post(names)[0] == 200
    with contextlib.closing(sqlite3.connect(daemon.queue)) as queue:
        assert queue.execute("SELECT body FROM jobs WHERE step = 'webhooks'").fetchall() == [(names,)]
        assert queue.execute("SELECT count(*) FROM jobs WHERE step = 'rejected'").fetchone() == (len(values),)


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


def test_a_large_webhook(daemon, s3):
    big = [alert(n, text="x" * 1_000_000) for n in range(7)]
    answer = daemon.post({"alerts": big})[1]
    assert {a["state"] for a in answer["alerts"]} <= {"archived", "queued"}
    until(lambda: len(s3.objects("alerts/")) == 7)
