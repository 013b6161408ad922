// Command grpc is grpc-go at both ends: `grpc serve PORT` and `grpc call TARGET`. The calls are the gRPC project's own
// interoperability cases, and what those leave out: large messages, many calls at once, a stream that is cut.
package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/interop"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const (
	// messageMax is what both ends take; grpc-go's own limit is 4 MiB.
	messageMax = 64 << 20
	// callMax bounds a call that should end.
	callMax = 60 * time.Second
	// large does not fit into any window.
	large = 24 << 20
	// parallel calls of each of the workers.
	parallel, workers = 50, 32
)

func serve(port string) error {
	listener, err := net.Listen("tcp", ":"+port)
	if err != nil {
		return err
	}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(messageMax), grpc.MaxSendMsgSize(messageMax))
	pb.RegisterTestServiceServer(server, interop.NewTestServer())
	return server.Serve(listener)
}

// cases of the gRPC project; each ends the process when it fails.
var cases = map[string]func(context.Context, pb.TestServiceClient, ...grpc.CallOption){
	"empty_unary":                 interop.DoEmptyUnaryCall,
	"large_unary":                 interop.DoLargeUnaryCall,
	"client_streaming":            interop.DoClientStreaming,
	"server_streaming":            interop.DoServerStreaming,
	"ping_pong":                   interop.DoPingPong,
	"empty_stream":                interop.DoEmptyStream,
	"timeout_on_sleeping_server":  interop.DoTimeoutOnSleepingServer,
	"cancel_after_begin":          interop.DoCancelAfterBegin,
	"cancel_after_first_response": interop.DoCancelAfterFirstResponse,
	"custom_metadata":             interop.DoCustomMetadata,
	"status_code_and_message":     interop.DoStatusCodeAndMessage,
	"special_status_message":      interop.DoSpecialStatusMessage,
	"unimplemented_method": func(ctx context.Context, c pb.TestServiceClient, _ ...grpc.CallOption) {
		_, err := c.UnimplementedCall(ctx, &pb.Empty{})
		if status.Code(err) != codes.Unimplemented {
			log.Fatalf("unimplemented_method: %v", err)
		}
	},
}

func payload(size int, seed byte) *pb.Payload {
	return &pb.Payload{Body: bytes.Repeat([]byte{seed}, size)}
}

// largeMessages sends and gets a message that is larger than every window between.
func largeMessages(ctx context.Context, client pb.TestServiceClient) error {
	reply, err := client.UnaryCall(ctx, &pb.SimpleRequest{ResponseSize: large, Payload: payload(large, 7)})
	if err != nil {
		return err
	}
	if got := len(reply.GetPayload().GetBody()); got != large {
		return fmt.Errorf("%d bytes of %d", got, large)
	}
	return nil
}

// manyAtOnce makes calls whose answers must not be mixed up: each asks for a size of its own.
func manyAtOnce(ctx context.Context, client pb.TestServiceClient) error {
	var group sync.WaitGroup
	failures := make(chan error, workers)
	for worker := 0; worker < workers; worker++ {
		group.Add(1)
		go func(worker int) {
			defer group.Done()
			for call := 0; call < parallel; call++ {
				size := worker*1000 + call
				request := &pb.SimpleRequest{ResponseSize: int32(size), Payload: payload(call, 1)}
				reply, err := client.UnaryCall(ctx, request)
				if err == nil && len(reply.GetPayload().GetBody()) != size {
					err = fmt.Errorf("%d bytes of %d", len(reply.GetPayload().GetBody()), size)
				}
				if err != nil {
					failures <- fmt.Errorf("call %d of worker %d: %w", call, worker, err)
					return
				}
			}
		}(worker)
	}
	group.Wait()
	close(failures)
	return <-failures
}

// trailers come after the last message of a stream, and headers before the first.
func trailers(ctx context.Context, client pb.TestServiceClient) error {
	ctx = metadata.AppendToOutgoingContext(ctx,
		"x-grpc-test-echo-initial", "first", "x-grpc-test-echo-trailing-bin", "\x00\xff last")
	stream, err := client.FullDuplexCall(ctx)
	if err != nil {
		return err
	}
	for _, size := range []int32{1, 100_000, 0} {
		request := &pb.StreamingOutputCallRequest{
			ResponseParameters: []*pb.ResponseParameters{{Size: size}}, Payload: payload(int(size), 2),
		}
		if err := stream.Send(request); err != nil {
			return err
		}
		reply, err := stream.Recv()
		if err != nil {
			return err
		}
		if got := len(reply.GetPayload().GetBody()); got != int(size) {
			return fmt.Errorf("%d bytes of %d", got, size)
		}
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	if _, err := stream.Recv(); err != io.EOF {
		return fmt.Errorf("not the end: %v", err)
	}
	header, err := stream.Header()
	if err != nil {
		return err
	}
	first, last := header.Get("x-grpc-test-echo-initial"), stream.Trailer().Get("x-grpc-test-echo-trailing-bin")
	if len(first) != 1 || first[0] != "first" || len(last) != 1 || last[0] != "\x00\xff last" {
		return fmt.Errorf("header %q, trailer %q", first, last)
	}
	return nil
}

// deadline ends a stream that the server keeps open; the next call is not disturbed.
func deadline(ctx context.Context, client pb.TestServiceClient) error {
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	stream, err := client.FullDuplexCall(short)
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.DeadlineExceeded {
		return fmt.Errorf("not the deadline: %v", err)
	}
	_, err = client.EmptyCall(ctx, &pb.Empty{})
	return err
}

func call(target string) error {
	connection, err := grpc.NewClient("passthrough:///"+target,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(messageMax), grpc.MaxCallSendMsgSize(messageMax)))
	if err != nil {
		return err
	}
	defer connection.Close()
	client := pb.NewTestServiceClient(connection)
	for name, run := range cases {
		ctx, cancel := context.WithTimeout(context.Background(), callMax)
		run(ctx, client)
		cancel()
		fmt.Println("ok", name)
	}
	ours := map[string]func(context.Context, pb.TestServiceClient) error{
		"large_messages": largeMessages, "many_at_once": manyAtOnce, "trailers": trailers, "deadline": deadline,
	}
	for name, run := range ours {
		ctx, cancel := context.WithTimeout(context.Background(), callMax)
		err := run(ctx, client)
		cancel()
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		fmt.Println("ok", name)
	}
	fmt.Println("all", len(cases)+len(ours))
	return nil
}

func main() {
	words := strings.Join(os.Args[1:], " ")
	verb, argument, found := strings.Cut(words, " ")
	var err error
	switch {
	case found && verb == "serve":
		err = serve(argument)
	case found && verb == "call":
		err = call(argument)
	default:
		err = fmt.Errorf("usage: grpc serve PORT | grpc call HOST:PORT")
	}
	if err != nil {
		log.Fatal(err)
	}
}
