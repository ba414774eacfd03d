//! Writers that note what was acknowledged to them, and the reader that asks for it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use futures_util::StreamExt as _;
use futures_util::future::join_all;
use generation_client::{Client, ClientConfig};

use crate::processes::wait_until;

/// Writers at once.
const WRITERS: usize = 16;
/// Reads at once.
const READERS: usize = 64;

/// Writers at work, each key written once.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicUsize>,
    thread: JoinHandle<Vec<String>>,
}

pub(crate) async fn connect(config: &Path) -> Client {
    let config = ClientConfig::load(config).unwrap();
    Client::builder().config(config).connect().await.unwrap()
}

pub(crate) fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.unwrap().block_on(work)
}

fn value_of(key: &str) -> String {
    format!("value of {key}")
}

impl Load {
    /// Begins to write keys that begin with `name`.
    pub(crate) fn start(config: PathBuf, name: &'static str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged = Arc::new(AtomicUsize::new(0));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&acknowledged));
        let thread = thread::spawn(move || {
            block_on(async {
                let client = connect(&config).await;
                let writers = (0..WRITERS).map(|writer| {
                    let (client, stopped, count) = (&client, &stopped, &count);
                    async move {
                        let mut keys = Vec::new();
                        for number in 0.. {
                            if stopped.load(Ordering::Relaxed) {
                                break;
                            }
                            let key = format!("{name}-{writer}-{number}");
                            // Whatever else it comes to is not promised.
                            if client.put(key.as_str(), value_of(&key)).await.is_ok() {
                                keys.push(key);
                                count.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                        keys
                    }
                });
                let keys = join_all(writers).await;
                client.close().await;
                keys.concat()
            })
        });
        Self {
            stop,
            acknowledged,
            thread,
        }
    }

    /// Waits until so many more writes were acknowledged: service goes on.
    pub(crate) fn wait_for_more(&self, writes: usize) {
        let before = self.acknowledged.load(Ordering::Relaxed);
        wait_until("acknowledged writes", || {
            self.acknowledged.load(Ordering::Relaxed) >= before + writes
        });
    }

    /// Stops the writers; what was acknowledged.
    pub(crate) fn finish(self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// Reads every key and compares its value.
pub(crate) fn assert_all_there(config: &Path, keys: &[String]) {
    assert!(!keys.is_empty());
    block_on(async {
        let client = connect(config).await;
        let reads = futures_util::stream::iter(keys).map(|key| {
            let client = &client;
            async move {
                let read = client.get(key.as_str()).await.unwrap();
                let value = read.value().map(|value| value.to_vec());
                assert_eq!(value, Some(value_of(key).into_bytes()), "{key} was acknowledged");
            }
        });
        reads.buffer_unordered(READERS).collect::<Vec<()>>().await;
        client.close().await;
    });
}
