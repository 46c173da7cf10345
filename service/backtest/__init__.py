"""Rehearse alarms: judge the history of groups as the service would have judged it."""
