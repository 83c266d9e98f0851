"""What commands share: exit statuses, and numbers for people."""

EXIT_FAILED = 1  # the run failed; the same command may be tried again
# Exit status after a stop by signal with everything saved (sysexits'
# EX_TEMPFAIL): a launcher may run the same command again.
EXIT_STOPPED = 75


def si(value: float) -> str:
  for unit in ("", "k", "M"):
    if value < 1000:
      return f"{value:.3g} {unit}"
    value /= 1000
  return f"{value:.3g} G"


def duration(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (
    f"{hours}:{minutes:02}:{seconds:02}"
    if hours
    else (f"{minutes}:{seconds:02}")
  )
