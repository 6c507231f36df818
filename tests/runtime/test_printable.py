import logging

from fastrlhf.runtime.printable import PrintableFormatter, printable


def test_control_characters_are_escaped_and_letters_of_any_script_are_not():
    name = "ro\x1b[31mws\n" + chr(228) + chr(26085) + "\u202e.jsonl"
    assert printable(name) == "ro\\x1b[31mws\\n" + chr(228) + chr(26085) + "\\u202e.jsonl"


def test_a_record_of_the_log_is_escaped_line_by_line():
    record = logging.LogRecord("fastrlhf", logging.WARNING, "", 0, "%s:\n12 rows", ("a\x07b",), None)
    assert PrintableFormatter("%(message)s").format(record) == "a\\x07b:\n12 rows"
