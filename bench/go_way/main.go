// The Go way: a service of the kind that orderlib replaces, written as such services are written. It stores each order in
// a transaction of its own with one INSERT per row, and reads an order with four SELECTs. bench/go.py measures it.
//
//	go_way migrate    create the tables, in the schema go_way
//	go_way consume    Kafka to PostgreSQL, until SIGTERM
//	go_way serve      GET /orders/{order_uid} on GO_WAY_BIND, until SIGTERM
//
// Settings: GO_WAY_DATABASE_URL, GO_WAY_BROKERS, GO_WAY_TOPIC, GO_WAY_GROUP, GO_WAY_BIND.
package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"log"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	_ "github.com/lib/pq"
	"github.com/segmentio/kafka-go"
)

const usage = "usage: go_way migrate | consume | serve"

const schema = `
CREATE TABLE IF NOT EXISTS go_way.orders (
    order_uid text PRIMARY KEY, track_number text NOT NULL, entry text NOT NULL, locale text NOT NULL,
    internal_signature text NOT NULL, customer_id text NOT NULL, delivery_service text NOT NULL, shardkey text NOT NULL,
    sm_id bigint NOT NULL, date_created timestamptz NOT NULL, oof_shard text NOT NULL);
CREATE TABLE IF NOT EXISTS go_way.delivery (
    order_uid text PRIMARY KEY REFERENCES go_way.orders, name text NOT NULL, phone text NOT NULL, zip text NOT NULL,
    city text NOT NULL, address text NOT NULL, region text NOT NULL, email text NOT NULL);
CREATE TABLE IF NOT EXISTS go_way.payment (
    order_uid text PRIMARY KEY REFERENCES go_way.orders, transaction text NOT NULL, request_id text NOT NULL,
    currency text NOT NULL, provider text NOT NULL, amount bigint NOT NULL, payment_dt bigint NOT NULL, bank text NOT NULL,
    delivery_cost bigint NOT NULL, goods_total bigint NOT NULL, custom_fee bigint NOT NULL);
CREATE TABLE IF NOT EXISTS go_way.items (
    id bigserial PRIMARY KEY, order_uid text NOT NULL REFERENCES go_way.orders, chrt_id bigint NOT NULL,
    track_number text NOT NULL, price bigint NOT NULL, rid text NOT NULL, name text NOT NULL, sale integer NOT NULL,
    size text NOT NULL, total_price bigint NOT NULL, nm_id bigint NOT NULL, brand text NOT NULL, status integer NOT NULL);
CREATE INDEX IF NOT EXISTS items_order_uid ON go_way.items (order_uid);
`

type Delivery struct {
	Name    string `json:"name"`
	Phone   string `json:"phone"`
	Zip     string `json:"zip"`
	City    string `json:"city"`
	Address string `json:"address"`
	Region  string `json:"region"`
	Email   string `json:"email"`
}

type Payment struct {
	Transaction  string `json:"transaction"`
	RequestID    string `json:"request_id"`
	Currency     string `json:"currency"`
	Provider     string `json:"provider"`
	Amount       int64  `json:"amount"`
	PaymentDt    int64  `json:"payment_dt"`
	Bank         string `json:"bank"`
	DeliveryCost int64  `json:"delivery_cost"`
	GoodsTotal   int64  `json:"goods_total"`
	CustomFee    int64  `json:"custom_fee"`
}

type Item struct {
	ChrtID      int64  `json:"chrt_id"`
	TrackNumber string `json:"track_number"`
	Price       int64  `json:"price"`
	Rid         string `json:"rid"`
	Name        string `json:"name"`
	Sale        int    `json:"sale"`
	Size        string `json:"size"`
	TotalPrice  int64  `json:"total_price"`
	NmID        int64  `json:"nm_id"`
	Brand       string `json:"brand"`
	Status      int    `json:"status"`
}

type Order struct {
	OrderUID          string    `json:"order_uid"`
	TrackNumber       string    `json:"track_number"`
	Entry             string    `json:"entry"`
	Delivery          Delivery  `json:"delivery"`
	Payment           Payment   `json:"payment"`
	Items             []Item    `json:"items"`
	Locale            string    `json:"locale"`
	InternalSignature string    `json:"internal_signature"`
	CustomerID        string    `json:"customer_id"`
	DeliveryService   string    `json:"delivery_service"`
	Shardkey          string    `json:"shardkey"`
	SmID              int64     `json:"sm_id"`
	DateCreated       time.Time `json:"date_created"`
	OofShard          string    `json:"oof_shard"`
}

func main() {
	if len(os.Args) != 2 {
		log.Fatal(usage)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	db, err := sql.Open("postgres", os.Getenv("GO_WAY_DATABASE_URL"))
	if err != nil {
		log.Fatal(err)
	}
	db.SetMaxOpenConns(16)
	db.SetMaxIdleConns(16)
	switch os.Args[1] {
	case "migrate":
		_, err = db.ExecContext(ctx, schema)
	case "consume":
		err = consume(ctx, db)
	case "serve":
		err = serve(ctx, db)
	default:
		log.Fatal(usage)
	}
	if err != nil && ctx.Err() == nil {
		log.Fatal(err)
	}
}

func consume(ctx context.Context, db *sql.DB) error {
	reader := kafka.NewReader(kafka.ReaderConfig{
		Brokers:     strings.Split(os.Getenv("GO_WAY_BROKERS"), ","),
		Topic:       os.Getenv("GO_WAY_TOPIC"),
		GroupID:     os.Getenv("GO_WAY_GROUP"),
		StartOffset: kafka.FirstOffset,
	})
	defer reader.Close()
	for {
		message, err := reader.FetchMessage(ctx)
		if err != nil {
			return err
		}
		var order Order
		if err := json.Unmarshal(message.Value, &order); err != nil {
			log.Printf("skipped offset %d: %v", message.Offset, err)
		} else if err := save(ctx, db, &order); err != nil {
			log.Printf("not saved at offset %d: %v", message.Offset, err)
			continue
		}
		if err := reader.CommitMessages(ctx, message); err != nil {
			return err
		}
	}
}

// save stores an order in one transaction, with one INSERT per row.
func save(ctx context.Context, db *sql.DB, o *Order) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if _, err := tx.ExecContext(ctx,
		`INSERT INTO go_way.orders VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)`,
		o.OrderUID, o.TrackNumber, o.Entry, o.Locale, o.InternalSignature, o.CustomerID, o.DeliveryService, o.Shardkey,
		o.SmID, o.DateCreated, o.OofShard); err != nil {
		return err
	}
	d := &o.Delivery
	if _, err := tx.ExecContext(ctx, `INSERT INTO go_way.delivery VALUES ($1, $2, $3, $4, $5, $6, $7, $8)`,
		o.OrderUID, d.Name, d.Phone, d.Zip, d.City, d.Address, d.Region, d.Email); err != nil {
		return err
	}
	p := &o.Payment
	if _, err := tx.ExecContext(ctx, `INSERT INTO go_way.payment VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)`,
		o.OrderUID, p.Transaction, p.RequestID, p.Currency, p.Provider, p.Amount, p.PaymentDt, p.Bank, p.DeliveryCost,
		p.GoodsTotal, p.CustomFee); err != nil {
		return err
	}
	for i := range o.Items {
		t := &o.Items[i]
		if _, err := tx.ExecContext(ctx, `INSERT INTO go_way.items
			(order_uid, chrt_id, track_number, price, rid, name, sale, size, total_price, nm_id, brand, status)
			VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)`,
			o.OrderUID, t.ChrtID, t.TrackNumber, t.Price, t.Rid, t.Name, t.Sale, t.Size, t.TotalPrice, t.NmID, t.Brand,
			t.Status); err != nil {
			return err
		}
	}
	return tx.Commit()
}

func serve(ctx context.Context, db *sql.DB) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /orders/{order_uid}", func(w http.ResponseWriter, r *http.Request) {
		order, err := get(r.Context(), db, r.PathValue("order_uid"))
		if errors.Is(err, sql.ErrNoRows) {
			http.Error(w, "not found", http.StatusNotFound)
			return
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(order)
	})
	server := &http.Server{Addr: os.Getenv("GO_WAY_BIND"), Handler: mux}
	go func() {
		<-ctx.Done()
		server.Close()
	}()
	return server.ListenAndServe()
}

// get reads an order with four SELECTs.
func get(ctx context.Context, db *sql.DB, uid string) (*Order, error) {
	o := &Order{}
	err := db.QueryRowContext(ctx, `SELECT order_uid, track_number, entry, locale, internal_signature, customer_id,
		delivery_service, shardkey, sm_id, date_created, oof_shard FROM go_way.orders WHERE order_uid = $1`, uid).Scan(
		&o.OrderUID, &o.TrackNumber, &o.Entry, &o.Locale, &o.InternalSignature, &o.CustomerID, &o.DeliveryService,
		&o.Shardkey, &o.SmID, &o.DateCreated, &o.OofShard)
	if err != nil {
		return nil, err
	}
	d := &o.Delivery
	err = db.QueryRowContext(ctx, `SELECT name, phone, zip, city, address, region, email FROM go_way.delivery
		WHERE order_uid = $1`, uid).Scan(&d.Name, &d.Phone, &d.Zip, &d.City, &d.Address, &d.Region, &d.Email)
	if err != nil {
		return nil, err
	}
	p := &o.Payment
	err = db.QueryRowContext(ctx, `SELECT transaction, request_id, currency, provider, amount, payment_dt, bank,
		delivery_cost, goods_total, custom_fee FROM go_way.payment WHERE order_uid = $1`, uid).Scan(
		&p.Transaction, &p.RequestID, &p.Currency, &p.Provider, &p.Amount, &p.PaymentDt, &p.Bank, &p.DeliveryCost,
		&p.GoodsTotal, &p.CustomFee)
	if err != nil {
		return nil, err
	}
	rows, err := db.QueryContext(ctx, `SELECT chrt_id, track_number, price, rid, name, sale, size, total_price, nm_id,
		brand, status FROM go_way.items WHERE order_uid = $1 ORDER BY id`, uid)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var t Item
		if err := rows.Scan(&t.ChrtID, &t.TrackNumber, &t.Price, &t.Rid, &t.Name, &t.Sale, &t.Size, &t.TotalPrice,
			&t.NmID, &t.Brand, &t.Status); err != nil {
			return nil, err
		}
		o.Items = append(o.Items, t)
	}
	return o, rows.Err()
}
