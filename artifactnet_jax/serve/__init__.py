"""The batch service.

An HTTP API (`app`) over job state (`store`) and files (`uploads`); a process that scores (`worker`,
kept alive by `service`), whose decoders run in processes of their own (`sandbox`).
"""
