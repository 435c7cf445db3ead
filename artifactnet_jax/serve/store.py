"""Job state: batches, their files, results and tokens, in SQLite or PostgreSQL.

A file waits while it has a `turn` and no result. Its result and the end of its turn are one
transaction, so that a kill at any moment leaves one or the other, and a second result is no row.
Nothing marks a file as being scored: whoever scores is one process, and starts anew after a kill.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from artifactnet_jax.results import WORDS

TURN_S = 1.0  # a batch gets one turn per second from its commit on: see `Store.commit`
BUSY_S = 30.0  # what a connection waits for another's SQLite lock
LOCAL = ""  # owner of what comes in without a token

_metadata = sa.MetaData()
_tokens = sa.Table(
    "tokens",
    _metadata,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
    sa.Column("created", sa.Float(53), nullable=False),
    sa.Column("expires", sa.Float(53)),
    sa.Column("revoked", sa.Float(53)),
)
_batches = sa.Table(
    "batches",
    _metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("owner", sa.String(16), nullable=False, index=True),
    sa.Column("single", sa.Boolean, nullable=False),  # of /v1/score: somebody waits for it
    sa.Column("created", sa.Float(53), nullable=False),
    sa.Column("committed", sa.Float(53)),
    sa.Column("finished", sa.Float(53)),
)


def _batch_column() -> sa.Column[str]:
    key = sa.ForeignKey("batches.id", ondelete="CASCADE")
    return sa.Column("batch", sa.String(32), key, nullable=False, index=True)


_files = sa.Table(
    "files",
    _metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    _batch_column(),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("turn", sa.Float(53), index=True),  # seconds since the epoch; NULL: does not wait
    sa.UniqueConstraint("batch", "position"),
)
_results = sa.Table(
    "results",
    _metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("file", sa.String(32), sa.ForeignKey("files.id", ondelete="CASCADE"), unique=True),
    _batch_column(),
    sa.Column("verdict", sa.String(16), nullable=False),  # or "failed"
    sa.Column("row", sa.Text, nullable=False),  # JSON, as `score` writes it
)
_keys = sa.Table(
    "idempotency",
    _metadata,
    sa.Column("owner", sa.String(16), primary_key=True),
    sa.Column("scope", sa.String(40), primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False),  # of the request
    sa.Column("reply", sa.Text, nullable=False),
    sa.Column("created", sa.Float(53), nullable=False),
)
_places = sa.Table("places", _metadata, sa.Column("id", sa.String(32), primary_key=True))


class StateError(Exception):
    """The batch is not in a state for this.

    `kind`: "not-found", "committed", "empty", "too-many", "key-reused".
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class File:
    """An uploaded file."""

    id: str
    name: str  # what the client calls it; never a path of ours
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A file whose turn it is."""

    id: str
    batch: str
    name: str


@dataclasses.dataclass(frozen=True)
class Key:
    """An Idempotency-Key in its scope, and the digest of the request that came with it."""

    owner: str
    scope: str
    key: str
    digest: str


def new_id() -> str:
    """128 random bits in hex."""
    return secrets.token_hex(16)


class Store:
    """The database at a SQLAlchemy URL; tables are made where they are missing.

    SQLite commits are on disk when they return (WAL, synchronous=FULL). Any method may raise
    sqlalchemy's DBAPIError: the disk is full, or the server cannot be reached.
    """

    def __init__(self, url: str):
        parsed = sa.make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        lite = parsed.get_backend_name() == "sqlite"
        options: dict[str, Any] = {"connect_args": {"timeout": BUSY_S}} if lite else {}
        self._engine = sa.create_engine(parsed, pool_pre_ping=not lite, max_overflow=40, **options)
        if lite:
            sa.event.listen(self._engine, "connect", _prepare_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)
        self._reading = self._engine.execution_options(reading=True)
        _metadata.create_all(self._engine)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def belongs_to(self, place: str) -> bool:
        """Whether the files of this database lie at `place`; the first place that asks has them."""
        with self._engine.begin() as db:
            ids = db.execute(sa.select(_places.c.id)).scalars().all()
            if not ids:
                db.execute(_places.insert().values(id=place))
        return not ids or place in ids

    # Tokens

    def add_token(self, name: str, days: float | None) -> str:
        """A new bearer token, which is stored only as a hash: this is the one time to see it."""
        token_id, secret, now = secrets.token_hex(8), secrets.token_urlsafe(32), time.time()
        expires = None if days is None else now + 86_400 * days
        row = {"id": token_id, "name": name, "hash": _hash(secret), "created": now}
        with self._engine.begin() as db:
            db.execute(_tokens.insert().values(**row, expires=expires))
        return f"anj_{token_id}_{secret}"

    def tokens(self) -> list[dict[str, Any]]:
        """id, name, created, expires and revoked of each token."""
        columns = [column for column in _tokens.c if column is not _tokens.c.hash]
        with self._reading.connect() as db:
            rows = db.execute(sa.select(*columns).order_by(_tokens.c.created))
            return [dict(row) for row in rows.mappings()]

    def revoke(self, token_id: str) -> bool:
        """Refuse a token from now on; False if there is none of this id."""
        change = _tokens.update().where(_tokens.c.id == token_id).values(revoked=time.time())
        with self._engine.begin() as db:
            return bool(db.execute(change).rowcount)

    def has_tokens(self) -> bool:
        """Whether a token was ever made: revoking the last one does not open the service."""
        with self._reading.connect() as db:
            return db.execute(sa.select(_tokens.c.id).limit(1)).first() is not None

    def owner(self, token: str) -> str | None:
        """The id of a valid token, else None."""
        prefix, _, rest = token.partition("_")
        token_id, _, secret = rest.partition("_")
        if prefix != "anj" or not token_id.isalnum() or not token_id.isascii():
            return None
        with self._reading.connect() as db:
            row = db.execute(sa.select(_tokens).where(_tokens.c.id == token_id)).first()
        if row is None or row.revoked is not None or (row.expires or math.inf) <= time.time():
            return None
        return token_id if hmac.compare_digest(row.hash, _hash(secret)) else None

    # Batches

    def create(self, owner: str, key: Key | None = None) -> str:
        """The id of a new, open batch. IntegrityError as of `add`; the key's reply is the id."""
        batch = new_id()
        with self._engine.begin() as db:
            row = {"id": batch, "owner": owner, "created": time.time(), "single": False}
            db.execute(_batches.insert().values(**row))
            if key is not None:
                _keep(db, key, batch)
        return batch

    def replayed(self, key: Key) -> str | None:
        """The reply that was given under this key; StateError if that request was another."""
        same = (_keys.c.owner == key.owner, _keys.c.scope == key.scope, _keys.c.key == key.key)
        with self._reading.connect() as db:
            row = db.execute(sa.select(_keys).where(*same)).first()
        if row is not None and row.digest != key.digest:
            text = "this Idempotency-Key came with another request: use a new one"
            raise StateError("key-reused", text)
        return None if row is None else row.reply

    def add(
        self, owner: str, batch: str, files: list[File], most: int, key: Key | None, reply: str
    ) -> None:
        """Add files to an open batch, and keep the reply under the key.

        StateError: no such open batch, or over `most` files. Raises sa.exc.IntegrityError if the
        same key was stored at the same time: then `replayed` has the reply.
        """
        with self._engine.begin() as db:
            row = _locked(db, owner, batch)
            if row.committed is not None:
                raise StateError("committed", "the batch is committed: create another")
            sums = sa.select(sa.func.count()).select_from(_files)
            count = db.execute(sums.where(_files.c.batch == batch)).scalar_one()
            if count + len(files) > most:
                raise StateError("too-many", f"a batch has {most} files at most: create another")
            _insert(db, batch, files, count)
            if key is not None:
                _keep(db, key, reply)

    def add_single(self, owner: str, file: File) -> str:
        """The id of a new batch of one file that is committed."""
        batch, now = new_id(), time.time()
        with self._engine.begin() as db:
            row = {"id": batch, "owner": owner, "created": now, "single": True}
            db.execute(_batches.insert().values(**row, committed=now))
            _insert(db, batch, [file], 0, now)
        return batch

    def commit(self, owner: str, batch: str) -> bool:
        """Queue the files of a batch; False if they were already.

        The turn of a file is the time of the commit plus a second for each file before it: a small
        batch does not wait for the whole of a large one, and no file can be overtaken for ever.
        """
        with self._engine.begin() as db:
            row = _locked(db, owner, batch)
            if row.committed is not None:
                return False
            now, files = time.time(), _files.c.batch == batch
            turn = _files.c.position * TURN_S + now
            if not db.execute(_files.update().where(files).values(turn=turn)).rowcount:
                raise StateError("empty", "the batch has no files: upload some first")
            db.execute(_batches.update().where(_batches.c.id == batch).values(committed=now))
        return True

    def status(self, owner: str, batch: str) -> dict[str, Any]:
        """State and counts; StateError if there is no such batch."""
        counted = sa.select(_results.c.verdict, sa.func.count().label("n"))
        counted = counted.where(_results.c.batch == batch).group_by(_results.c.verdict)
        sums = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(_files.c.bytes), 0))
        with self._reading.connect() as db:
            row = _found(db, owner, batch)
            files, size = db.execute(sums.where(_files.c.batch == batch)).one()
            verdicts = {verdict: n for verdict, n in db.execute(counted)}
        state = "open" if row.committed is None else "running" if row.finished is None else "done"
        failed = verdicts.pop("failed", 0)
        return {
            "id": batch,
            "state": state,
            "created": row.created,
            "committed": row.committed,
            "finished": row.finished,
            "files": files,
            "bytes": int(size),
            "scored": sum(verdicts.values()),
            "failed": failed,
            "verdicts": {name: verdicts.get(name, 0) for name in WORDS},
        }

    def check_open(self, owner: str, batch: str) -> int:
        """How many files an open batch has; StateError if it is not, so that no upload begins."""
        status = self.status(owner, batch)
        if status["state"] != "open":
            raise StateError("committed", "the batch is committed: create another")
        return int(status["files"])

    def rows_after(self, batch: str, position: int, most: int) -> list[tuple[int, str | None]]:
        """(position, row) of files in order of upload, after a position; no row yet: None."""
        both = sa.select(_files.c.position, _results.c.row)
        both = both.outerjoin_from(_files, _results, _results.c.file == _files.c.id)
        both = both.where(_files.c.batch == batch, _files.c.position > position)
        with self._reading.connect() as db:
            rows = db.execute(both.order_by(_files.c.position).limit(most))
            return [(row.position, row.row) for row in rows]

    def results_after(self, batch: str, seq: int, most: int) -> list[tuple[int, str]]:
        """(number, row) of results in order of their arrival, after a number."""
        columns = sa.select(_results.c.seq, _results.c.row)
        later = columns.where(_results.c.batch == batch, _results.c.seq > seq)
        with self._reading.connect() as db:
            rows = db.execute(later.order_by(_results.c.seq).limit(most))
            return [(row.seq, row.row) for row in rows]

    def delete(self, owner: str, batch: str) -> list[str]:
        """Remove a batch with its results; returns its files' ids, for the disk."""
        with self._engine.begin() as db:
            _locked(db, owner, batch)
            return _delete(db, [batch])

    def expire(self, retention_s: float) -> list[str]:
        """Remove batches that ended, or were left open, longer ago than that; as `delete`."""
        old = time.time() - retention_s
        left = sa.and_(_batches.c.committed.is_(None), _batches.c.created < old)
        ended = sa.select(_batches.c.id).where(sa.or_(_batches.c.finished < old, left))
        with self._engine.begin() as db:
            db.execute(_keys.delete().where(_keys.c.created < old))
            return _delete(db, db.execute(ended).scalars().all())

    def drop_singles(self) -> None:
        """Remove the batches that nobody waits for any more, at a start."""
        with self._engine.begin() as db:
            db.execute(_batches.delete().where(_batches.c.single))

    # Scoring

    def waiting(self, most: int) -> list[Waiting]:
        """The next files, by turn."""
        due = sa.select(_files.c.id, _files.c.batch, _files.c.name)
        due = due.where(_files.c.turn.is_not(None)).order_by(_files.c.turn, _files.c.id)
        with self._reading.connect() as db:
            return [Waiting(*row) for row in db.execute(due.limit(most))]

    def count_waiting(self) -> int:
        """How many files wait for their result."""
        count = sa.select(sa.func.count()).where(_files.c.turn.is_not(None))
        with self._reading.connect() as db:
            return db.execute(count).scalar_one()

    def on_disk(self) -> set[str]:
        """Files whose audio is still needed: of open batches, and those that wait."""
        needed = sa.select(_files.c.id).join(_batches)
        needed = needed.where(sa.or_(_files.c.turn.is_not(None), _batches.c.committed.is_(None)))
        with self._reading.connect() as db:
            return set(db.execute(needed).scalars())

    def record(self, file: Waiting, verdict: str, row: str) -> bool:
        """Write the result of a file; False if it has one already, or its batch was deleted."""
        with self._engine.begin() as db:
            batch = sa.select(_batches.c.id).where(_batches.c.id == file.batch)
            if db.execute(batch.with_for_update()).first() is None:
                return False
            mine = sa.and_(_files.c.id == file.id, _files.c.turn.is_not(None))
            if not db.execute(_files.update().where(mine).values(turn=None)).rowcount:
                return False
            values = {"file": file.id, "batch": file.batch, "verdict": verdict, "row": row}
            db.execute(_results.insert().values(**values))
            rest = sa.select(_files.c.id).where(
                _files.c.batch == file.batch, _files.c.turn.is_not(None)
            )
            if db.execute(rest.limit(1)).first() is None:
                ended = _batches.update().where(_batches.c.id == file.batch)
                db.execute(ended.values(finished=time.time()))
        return True


def _hash(secret: str) -> str:
    """SHA-256: the secret has 256 random bits, so that a slow hash would add nothing."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions begin where we say
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(db: sa.Connection) -> None:
    """A writer takes the lock at once: a reader that became one could not wait for it."""
    reading = db.get_execution_options().get("reading")
    db.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


def _found(db: sa.Connection, owner: str, batch: str, lock: bool = False) -> Any:
    mine = sa.select(_batches).where(_batches.c.id == batch, _batches.c.owner == owner)
    row = db.execute(mine.with_for_update() if lock else mine).first()
    if row is None:
        raise StateError("not-found", "no such batch: it may have expired")
    return row


def _locked(db: sa.Connection, owner: str, batch: str) -> Any:
    """A batch, which no other transaction changes until this one ends."""
    return _found(db, owner, batch, lock=True)


def _insert(
    db: sa.Connection, batch: str, files: list[File], first: int, turn: float | None = None
) -> None:
    rows = [
        {**dataclasses.asdict(file), "batch": batch, "position": first + i, "turn": turn}
        for i, file in enumerate(files)
    ]
    if rows:
        db.execute(_files.insert(), rows)


def _delete(db: sa.Connection, batches: Sequence[str]) -> list[str]:
    ids = db.execute(sa.select(_files.c.id).where(_files.c.batch.in_(batches))).scalars().all()
    db.execute(_batches.delete().where(_batches.c.id.in_(batches)))
    return list(ids)


def _keep(db: sa.Connection, key: Key, reply: str) -> None:
    values = dataclasses.asdict(key) | {"reply": reply, "created": time.time()}
    db.execute(_keys.insert().values(**values))
