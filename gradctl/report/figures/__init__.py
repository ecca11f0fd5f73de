"""The figures of a report as shapes, which the HTML page draws as SVG and ``--plot`` with matplotlib."""
