//! Our record layer against itself and against rustls' own, over loopback.

use std::sync::Arc;

use rcgen::{CertificateParams, KeyPair};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy, split};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, LocalSet, spawn_local};

use super::*;
use crate::tls::handshake::{Handshaken, accept, connect};
use crate::tls::provider;

const NAME: &str = "server.test";

fn configs() -> (Arc<ClientConfig>, Arc<ServerConfig>) {
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new([NAME.to_owned()]).unwrap();
    let certificate: CertificateDer<'static> = params.self_signed(&key).unwrap().into();
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    let roots = Arc::new(roots);
    let key = || PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), provider());
    let mut server = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(vec![certificate.clone()], key())
        .unwrap();
    server.enable_secret_extraction = true;
    server.send_tls13_tickets = 0;
    let mut client = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate], key())
        .unwrap();
    client.enable_secret_extraction = true;
    (Arc::new(client), Arc::new(server))
}

fn name() -> ServerName<'static> {
    ServerName::try_from(NAME).unwrap()
}

fn local<F: Future<Output = ()>>(test: F) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, async {
        let deadline = std::time::Duration::from_secs(60);
        let outcome = tokio::time::timeout(deadline, test).await;
        outcome.expect("the test stands still");
    });
}

async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap())
        .await
        .unwrap();
    (client, listener.accept().await.unwrap().0)
}

async fn pair() -> (TlsStream, TlsStream) {
    let (client_config, server_config) = configs();
    let (client, server) = sockets().await;
    let (client, server) = tokio::join!(
        connect(client_config, name(), client),
        accept(&server_config, server)
    );
    let (client, server): (Handshaken, Handshaken) = (client.unwrap(), server.unwrap());
    assert_eq!(server.server_name.as_deref(), Some(NAME));
    assert!(server.peer.is_some() && client.peer == server.peer);
    (client.stream, server.stream)
}

fn bytes(length: usize) -> Vec<u8> {
    let mut rng = mesh_core::rng::Rng::new(length as u64);
    (0..length).map(|_| rng.below(256) as u8).collect()
}

/// Sends `data` one way through `stream`'s other end, which gives it back.
async fn there_and_back<S>(stream: S, data: Vec<u8>)
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let (mut reader, mut writer) = split(stream);
    let expected = data.clone();
    let writing = spawn_local(async move {
        writer.write_all(&data).await.unwrap();
        writer.shutdown().await.unwrap();
    });
    let mut received = Vec::new();
    reader.read_to_end(&mut received).await.unwrap();
    writing.await.unwrap();
    assert!(received == expected, "{} bytes came back", received.len());
}

fn echo<S>(stream: S) -> JoinHandle<()>
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    spawn_local(async move {
        let (mut reader, mut writer) = split(stream);
        copy(&mut reader, &mut writer).await.unwrap();
        writer.shutdown().await.unwrap();
    })
}

#[test]
fn bytes_pass_both_ways_in_any_amount() {
    local(async {
        for length in [
            0,
            1,
            CONTENT_MAX - 1,
            CONTENT_MAX,
            CONTENT_MAX + 1,
            8_000_000,
        ] {
            let (client, server) = pair().await;
            let echo = echo(server);
            there_and_back(client, bytes(length)).await;
            echo.await.unwrap();
        }
    });
}

#[test]
fn rustls_own_client_and_server_understand_us() {
    local(async {
        let (client_config, server_config) = configs();
        let (client, server) = sockets().await;
        let theirs = tokio_rustls::TlsConnector::from(Arc::clone(&client_config));
        let (client, server) = tokio::join!(
            theirs.connect(name(), client),
            accept(&server_config, server)
        );
        let echoed = echo(server.unwrap().stream);
        there_and_back(client.unwrap(), bytes(3_000_000)).await;
        echoed.await.unwrap();

        let (client, server) = sockets().await;
        let theirs = tokio_rustls::TlsAcceptor::from(server_config);
        let (client, server) = tokio::join!(
            connect(client_config, name(), client),
            theirs.accept(server)
        );
        let echoed = echo(server.unwrap());
        there_and_back(client.unwrap().stream, bytes(3_000_000)).await;
        echoed.await.unwrap();
    });
}

#[test]
fn data_right_behind_the_handshake_is_not_lost() {
    local(async {
        let (client_config, server_config) = configs();
        let (client, server) = sockets().await;
        let sending = spawn_local(async move {
            let mut client = connect(client_config, name(), client).await.unwrap().stream;
            client.write_all(&bytes(200_000)).await.unwrap();
            client.shutdown().await.unwrap();
        });
        let mut server = accept(&server_config, server).await.unwrap().stream;
        let mut received = Vec::new();
        server.read_to_end(&mut received).await.unwrap();
        assert!(received == bytes(200_000));
        sending.await.unwrap();
    });
}

#[test]
fn the_peer_is_told_why_a_handshake_failed() {
    local(async {
        let (client_config, server_config) = configs();
        let (stranger, _) = configs();
        for (config, alert_at_client) in [(stranger, false), (client_config, true)] {
            let (client, server) = sockets().await;
            let mut server_config = ServerConfig::clone(&server_config);
            if alert_at_client {
                // A client that shows nothing learns it after its own part is through.
                server_config.alpn_protocols = vec![b"other".to_vec()];
            }
            let mut config = ClientConfig::clone(&config);
            config.alpn_protocols = vec![b"meshwork/1".to_vec()];
            let (client, server) = tokio::join!(
                connect(Arc::new(config), name(), client),
                accept(&server_config, server)
            );
            let alerted = if alert_at_client { client } else { server };
            let error = alerted.unwrap_err();
            let inner = error.get_ref().and_then(|e| e.downcast_ref::<Error>());
            assert!(matches!(inner, Some(Error::AlertReceived(_))), "{error:?}");
        }
    });
}

#[test]
fn what_is_no_tls_is_refused() {
    local(async {
        let (_, server_config) = configs();
        let mut rng = mesh_core::rng::Rng::new(3);
        for round in 0..300 {
            let (mut client, server) = sockets().await;
            let mut wire: Vec<u8> = (0..rng.below(3000)).map(|_| rng.below(256) as u8).collect();
            // Most begin as a handshake record of some length does.
            if round % 4 > 0 {
                let length = rng.below(2000) as u16;
                let [high, low] = length.to_be_bytes();
                wire.splice(..wire.len().min(9), [22, 3, 1, high, low, 1, 0, 0, low]);
            }
            client.write_all(&wire).await.unwrap();
            client.shutdown().await.unwrap();
            let error = accept(&server_config, server).await.unwrap_err();
            let kinds = [io::ErrorKind::InvalidData, io::ErrorKind::UnexpectedEof];
            assert!(kinds.contains(&error.kind()), "{error:?}");
        }
    });
}

#[test]
fn keys_are_renewed_and_the_peer_may_ask_for_it() {
    local(async {
        let (mut client, mut server) = pair().await;
        (client.key_max, server.key_max) = (3, 5);
        let echoed = echo(server);
        there_and_back(client, bytes(4_000_000)).await;
        echoed.await.unwrap();

        // rustls' own side asks us, and understands the answer.
        let (client_config, server_config) = configs();
        let (client, server) = sockets().await;
        let theirs = tokio_rustls::TlsConnector::from(client_config);
        let (client, server) = tokio::join!(
            theirs.connect(name(), client),
            accept(&server_config, server)
        );
        let mut client = client.unwrap();
        client.get_mut().1.refresh_traffic_keys().unwrap();
        let echoed = echo(server.unwrap().stream);
        there_and_back(client, bytes(1_000_000)).await;
        echoed.await.unwrap();
    });
}

#[test]
fn an_end_that_the_peer_did_not_say_is_an_error() {
    local(async {
        let (client, mut server) = pair().await;
        drop(client);
        let error = server.read(&mut [0; 16]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    });
}

#[test]
fn what_is_not_a_record_of_the_peer_is_an_error() {
    local(async {
        for wire in [
            // Too long, too short, of another type, not sealed by the peer.
            &[23, 3, 3, 0xff, 0xff][..],
            &[23, 3, 3, 0, 3, 1, 2, 3],
            &[22, 3, 3, 0, 1, 0],
            &[
                23, 3, 3, 0, 20, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19,
                20,
            ],
        ] {
            let (mut client, mut server) = pair().await;
            client.socket.write_all(wire).await.unwrap();
            let error = server.read(&mut [0; 16]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{wire:?}");
        }
    });
}

#[test]
fn endless_empty_records_are_an_error() {
    local(async {
        let (mut client, mut server) = pair().await;
        let mut wire = Vec::new();
        for _ in 0..=EMPTY_MAX {
            client.sealer.seal_data(&[], &mut wire).unwrap();
        }
        client.socket.write_all(&wire).await.unwrap();
        let error = server.read(&mut [0; 16]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    });
}

#[test]
fn a_small_reader_gets_all() {
    local(async {
        let (mut client, mut server) = pair().await;
        client.write_all(&bytes(100_000)).await.unwrap();
        client.shutdown().await.unwrap();
        let mut received = Vec::new();
        let mut part = [0; 7];
        loop {
            let bytes = server.read(&mut part).await.unwrap();
            if bytes == 0 {
                break;
            }
            received.extend_from_slice(&part[..bytes]);
        }
        assert!(received == bytes(100_000));
    });
}

#[test]
fn a_full_socket_is_waited_for() {
    local(async {
        let (client, server) = pair().await;
        let (mut reader, _keep) = split(server);
        let writing = spawn_local(async move {
            let mut client = client;
            client.write_all(&bytes(20_000_000)).await.unwrap();
            client.shutdown().await.unwrap();
        });
        // The socket's buffers are full before anything is read.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        let mut received = Vec::new();
        reader.read_to_end(&mut received).await.unwrap();
        writing.await.unwrap();
        assert!(received == bytes(20_000_000));
    });
}
