"""The files of a run, and the trackers that receive a copy of its rows."""
