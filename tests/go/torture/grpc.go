package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"strconv"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const (
	service = "meshwork.Torture"
	method  = "Exchange"
)

// bare messages are bytes as they are: what is tested needs no schema.
type bare struct{}

func (bare) Name() string { return "bare" }

func (bare) Marshal(message any) ([]byte, error) {
	part, good := message.(*[]byte)
	if !good {
		return nil, fmt.Errorf("%T is no bytes", message)
	}
	// It is queued, and the caller fills its buffer anew.
	return append([]byte(nil), *part...), nil
}

func (bare) Unmarshal(data []byte, message any) error {
	part, good := message.(*[]byte)
	if !good {
		return fmt.Errorf("%T is no bytes", message)
	}
	*part = append((*part)[:0], data...)
	return nil
}

var stream = grpc.StreamDesc{StreamName: method, Handler: serveExchange, ServerStreams: true, ClientStreams: true}

// serveGRPC answers calls until it is killed.
func serveGRPC(port string) error {
	listener, err := net.Listen("tcp", ":"+port)
	if err != nil {
		return err
	}
	server := grpc.NewServer(grpc.ForceServerCodec(bare{}), grpc.MaxConcurrentStreams(serverStreams))
	server.RegisterService(&grpc.ServiceDesc{
		ServiceName: service, HandlerType: (*any)(nil), Streams: []grpc.StreamDesc{stream},
	}, nil)
	return server.Serve(listener)
}

func serveExchange(_ any, stream grpc.ServerStream) error {
	head, _ := metadata.FromIncomingContext(stream.Context())
	asked, err := parse(append(head.Get("x-wanted"), "")[0])
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	if err := stream.SendHeader(nil); err != nil {
		return err
	}
	messages := &messages{stream: stream}
	if err := both(stream.Context(), asked, messages, messages); err != nil {
		return status.Error(codes.Aborted, err.Error())
	}
	stream.SetTrailer(metadata.Pairs("x-taken", strconv.FormatInt(asked.up.bytes, 10)))
	return nil
}

// messages of either end as bytes.
type messages struct {
	stream interface {
		SendMsg(any) error
		RecvMsg(any) error
	}
	message, rest []byte
}

func (m *messages) Write(part []byte) (int, error) {
	if err := m.stream.SendMsg(&part); err != nil {
		return 0, err
	}
	return len(part), nil
}

func (m *messages) Read(part []byte) (int, error) {
	for len(m.rest) == 0 {
		if err := m.stream.RecvMsg(&m.message); err != nil {
			return 0, err
		}
		m.rest = m.message
	}
	n := copy(part, m.rest)
	m.rest = m.rest[n:]
	return n, nil
}

type clientGRPC struct{ *grpc.ClientConn }

func dialGRPC(to string) (connection, error) {
	client, err := grpc.NewClient("passthrough:///"+to,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(bare{})))
	return clientGRPC{client}, err
}

type callGRPC struct {
	messages
	client grpc.ClientStream
}

func (c clientGRPC) begin(ctx context.Context, w wanted) (exchange, error) {
	ctx = metadata.AppendToOutgoingContext(ctx, "x-wanted", w.query())
	call, err := c.NewStream(ctx, &stream, "/"+service+"/"+method)
	if err == nil && w.up.bytes == 0 {
		err = call.CloseSend()
	}
	if err != nil {
		return nil, err
	}
	return &callGRPC{messages{stream: call}, call}, nil
}

// Write says why: grpc-go tells a writer only that it is over, and a reader the status.
func (c *callGRPC) Write(part []byte) (int, error) {
	n, err := c.messages.Write(part)
	if err == io.EOF {
		err = io.ErrClosedPipe
	}
	return n, err
}

func (c *callGRPC) CloseWrite() error { return c.client.CloseSend() }

func (c *callGRPC) Taken() string { return append(c.client.Trailer().Get("x-taken"), "")[0] }
