"""From scores and logs to metrics, tables and figures."""
