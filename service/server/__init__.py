"""Server processes: start one or several, supervise them, hand connections to them, drain and stop."""
