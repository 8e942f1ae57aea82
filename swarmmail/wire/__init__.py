"""What is on the wire: packets are captured on the hosts, and judged here.

``judge.py`` and ``verdict.py`` are pure (bytes in, verdict out); ``capture.py`` and ``agent.py`` act on hosts.
"""
