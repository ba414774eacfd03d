//! The state machine of one Generation shard: store, eviction, expiry, versions, cursors.
