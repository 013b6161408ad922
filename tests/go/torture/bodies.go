package main

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"
)

const (
	// unending: without an end of its own: longer than any test.
	unending = 1 << 46
	// middle is behind every buffer on the way: what is cut then is in the middle, at both ends.
	middle = 4 << 20
)

// partOf is how much smaller the bodies of the further forms are.
const partOf = 8

// bodies passes one of each form, both ways at once: the first as large as is said.
func bodies(o options) error {
	bytes := o.bytes
	for _, p := range o.protocols {
		over, err := p.connect()
		if err != nil {
			return err
		}
		for _, length := range []bool{true, false} {
			if length && p.name == "grpc" {
				continue
			}
			w := wanted{body: whole(bytes, 11), up: whole(bytes, 12), length: length}
			if err := exchanged(context.Background(), over, w, unwatched); err != nil {
				return fmt.Errorf("%s, length %t: %w", p.name, length, err)
			}
			say("both ways %s, length %t: %d", p.name, length, bytes)
			bytes = o.bytes / partOf
		}
		over.Close()
	}
	return nil
}

// transfer without an end, and how far its directions are.
type transfer struct {
	name      string
	over      connection
	w         wanted
	sent, got int64
	outcome   error
}

// endless starts a transfer of every kind, says `flowing` when all are in their middle, and how each ended when all
// have: none may look whole.
func endless(o options) error {
	var transfers []*transfer
	for _, p := range o.protocols {
		over, err := p.connect()
		if err != nil {
			return err
		}
		for _, length := range []bool{true, false} {
			if length && p.name == "grpc" {
				continue
			}
			// Those that flow, and those that stand in the middle with nothing under way.
			for _, stop := range []int64{-1, middle} {
				long := func(seed int64) body { return body{bytes: unending, seed: seed, stop: stop} }
				for _, direction := range []string{"down", "up", "both ways"} {
					t := &transfer{over: over, w: wanted{length: length, body: whole(1, 1)}}
					if direction != "up" {
						t.w.body = long(21)
					}
					if direction != "down" {
						t.w.up = long(22)
					}
					t.name = fmt.Sprintf("%s %s, length %t, stop %d", p.name, direction, length, stop)
					transfers = append(transfers, t)
				}
			}
		}
	}
	ended := make(chan *transfer, len(transfers))
	for _, t := range transfers {
		go func(t *transfer) {
			t.outcome = t.run()
			ended <- t
		}(t)
	}
	for deadline := time.Now().Add(stuck); ; time.Sleep(lookEvery) {
		late := ""
		for _, t := range transfers {
			if !t.flows() {
				late = t.name
			}
		}
		if late == "" {
			break
		}
		select {
		case t := <-ended:
			return fmt.Errorf("%s ended before %s was under way: %v", t.name, late, t.outcome)
		default:
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: stuck", late)
		}
	}
	say("flowing")
	var deceived error
	for range transfers {
		t := <-ended
		if _, mistaken := t.outcome.(mistake); mistaken || t.outcome == nil {
			say("%s LOOKS WHOLE: %v", t.name, t.outcome)
			deceived = wrong("a body that was cut looks whole")
		} else {
			say("%s cut: %v", t.name, t.outcome)
		}
	}
	say("ended %d", len(transfers))
	return deceived
}

func (t *transfer) flows() bool {
	up := t.w.up.bytes == 0 || atomic.LoadInt64(&t.sent) >= middle
	return up && (t.w.bytes < unending || atomic.LoadInt64(&t.got) >= middle)
}

// run says nil when all seems whole: then its caller was deceived.
func (t *transfer) run() error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	call, err := t.over.begin(ctx, t.w)
	if err != nil {
		return err
	}
	// Why it ended is the reader's to hear.
	go send(call, t.w.up, func(n int) { atomic.AddInt64(&t.sent, int64(n)) })
	return take(call, t.w.body, func(n int) { atomic.AddInt64(&t.got, int64(n)) })
}
