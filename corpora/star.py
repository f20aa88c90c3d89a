"""STAR -> a log: python -m corpora.star FOLDER out.jsonl

FOLDER is a clone of RasaHQ/STAR, or its dialogues/. A wizard's message picked from the flow chart has as
`asks` the slot that its label asks for, if any. Of messages in the wizard's own words hindsight.py reads
the question mark. What the user said stands in the wizard's queries: a value becomes `learned` at the
first message of the user that holds it, else at the answer to the last question for it. Left out are
values that the user neither wrote nor was asked for, alternatives, negations, and parameters that no flow
chart asks for. Where a side disconnected during the dialogue, `success` is false.
"""
import re

import yaml

from corpora.common import convert
from records import cli

# The slot of each parameter of a query: the label of the flow chart's question, without its "ask_"
SLOTS = yaml.safe_load("""
{apartment_schedule Name: apartment_apartment_name, apartment_schedule RenterName: name,
 apartment_schedule Day: apartment_day, apartment_schedule StartTimeHour: apartment_start_time,
 apartment_schedule ApplicationFeePaid: apartment_application_fee_paid,
 apartment_schedule Message: apartment_custom_message, apartment_search Price: apartment_price,
 apartment_search NumRooms: apartment_num_bedrooms, apartment_search Level: apartment_floor,
 apartment_search MaxLevel: apartment_floor, apartment_search HasElevator: apartment_elevator,
 apartment_search HasBalcony: apartment_balcony, apartment_search BalconySide: apartment_balcony,
 apartment_search NearbyPOIs: apartment_nearby_pois, apartment_search Name: apartment_apartment_name,
 bank_balance FullName: name, bank_balance AccountNumber: bank_account_number, bank_balance PIN: bank_pin,
 bank_balance DateOfBirth: bank_dob, bank_balance SecurityAnswer1: bank_mothers_maiden_name,
 bank_balance SecurityAnswer2: bank_childhood_pets_name, bank_balance FraudReport: bank_fraud_details,
 bank_fraud_report FullName: name, bank_fraud_report AccountNumber: bank_account_number,
 bank_fraud_report PIN: bank_pin, bank_fraud_report DateOfBirth: bank_dob,
 bank_fraud_report SecurityAnswer1: bank_mothers_maiden_name,
 bank_fraud_report SecurityAnswer2: bank_childhood_pets_name,
 bank_fraud_report FraudReport: bank_fraud_details, doctor_followup Name: doctor_doctor_name,
 doctor_followup PatientName: name, doctor_followup Day: doctor_day,
 doctor_followup StartTimeHour: doctor_start_time, doctor_followup Symptoms: doctor_symptoms,
 doctor_schedule Name: doctor_doctor_name, doctor_schedule PatientName: name,
 doctor_schedule Day: doctor_day, doctor_schedule StartTimeHour: doctor_start_time,
 doctor_schedule Symptoms: doctor_symptoms, hotel_book Name: hotel_hotel, hotel_book CustomerName: name,
 hotel_book StartDate: hotel_date_from, hotel_book EndDate: hotel_date_to,
 hotel_book CustomerRequest: hotel_customer_request, hotel_search Name: hotel_name,
 hotel_search Location: hotel_location, hotel_search Cost: hotel_price,
 hotel_search AverageRating: hotel_rating, hotel_service_request Name: hotel_hotel,
 hotel_service_request CustomerName: name, hotel_service_request RoomNumber: hotel_room_number,
 hotel_service_request Time: hotel_time, hotel_service_request CustomerRequest: hotel_service_request,
 meeting_schedule Name: meeting_guest_name, meeting_schedule UserName: name,
 meeting_schedule Day: meeting_day, meeting_schedule StartTimeHour: meeting_start_time,
 meeting_schedule EndTimeHour: meeting_end_time, meeting_schedule MeetingReason: meeting_reason,
 party_plan Name: party_venue, party_plan HostName: name, party_plan Day: party_day,
 party_plan StartTimeHour: party_starting_time, party_plan NumberGuests: party_number_of_guests,
 party_plan FoodRequest: party_food, party_plan DrinksRequest: party_drinks, party_rsvp Name: party_venue,
 party_rsvp HostName: party_host, party_rsvp GuestName: name, party_rsvp ArrivalTime: party_arrival_time,
 party_rsvp NumberGuests: party_number_of_guests, party_rsvp NeedParking: party_parking_needed,
 party_rsvp DietaryRestrictions: party_dietary_restrictions, plane_book id: plane_flight_id,
 plane_book CustomerName: name, plane_search DepartureCity: departure_location,
 plane_search ArrivalCity: plane_arrival_city, plane_search Date: plane_date,
 plane_search id: plane_flight_id, restaurant_book Name: restaurant_restaurant,
 restaurant_book CustomerName: name, restaurant_book Time: restaurant_time,
 restaurant_book PartySize: restaurant_size, restaurant_search Name: restaurant_restaurant,
 restaurant_search Location: restaurant_location, restaurant_search Food: restaurant_food_type,
 restaurant_search AverageRating: restaurant_rating,
 restaurant_search TakesReservations: restaurant_takes_reservations,
 restaurant_search DoesDelivery: restaurant_delivery, ride_book CustomerName: name,
 ride_book DepartureLocation: ride_departure, ride_book ArrivalLocation: ride_destination,
 ride_change id: ride_booking_number, ride_change CustomerName: name,
 ride_change ChangeDescription: ride_change, ride_status id: ride_booking_number,
 ride_status CustomerName: name, ride_status ChangeDescription: ride_change,
 spaceship_access_codes UserName: name, spaceship_access_codes UserRank: spaceship_rank,
 spaceship_access_codes Code: spaceship_code, spaceship_access_codes CodeType: spaceship_code_type,
 spaceship_life_support LockManufacturer: spaceship_lock_manufacturer,
 spaceship_life_support ColorOfTopCable: spaceship_colour_top_cable,
 spaceship_life_support ColorOfSecondCable: spaceship_colour_second_cable,
 trip_directions DepartureLocation: departure_location,
 trip_directions ArrivalLocation: trip_arrival_location, trip_directions TravelMode: trip_travel_mode,
 trip_directions DepartureTime: trip_departure_time, trivia QuestionNum: trivia_question_number,
 weather City: weather_location, weather Day: weather_day}
""")
# 12, "9 am" or api.is_equal_to("9 am"), but no alternatives and nothing negated
VALUE = r'^(?!api\.\w*not)(?:api\.\w+)?[\[("\s]*([^"\s][^"]*?)[])"\s]*$'
# A value as whole words, "9am" as well as "9 am". A yes or no is not searched: it may answer anything.
WORDS = r"(?i)(?<!\w)%s(?!\w)(?<!\byes)(?<!\bno)"


def reveal(query, replies, asked):
    """Note each value of a query at the first reply that holds it, else at the answer to the last question.

    replies: the user's messages so far; asked: {slot: how many of these came before the last question}.
    """
    for pair in query["Constraints"]:
        for name, text in pair.items():
            slot = SLOTS.get(f"{query['APIName']} {name}")
            for value in re.findall(VALUE, text if slot else ""):
                words = WORDS % re.escape(value).replace(r"\ ", r"\s*")
                found = [reply for reply in replies if re.search(words, reply["content"])]
                found += replies[asked.get(slot, len(replies)):]
                for reply in found[:1]:
                    reply["learned"].setdefault(slot, value)


def read(_, dialogue):
    """Yield the session of a file."""
    messages, replies = [], []
    asked = {}
    for event in dialogue["Events"]:
        match event["Agent"], event["Action"]:
            case "User", "utter":
                replies.append({"role": "user", "content": event["Text"], "learned": {}})
                messages += replies[-1:]
            case "Wizard", "utter" | "pick_suggestion":
                slot = event.get("ActionLabel", "").replace("ask_", "")
                asks = [slot][:slot in SLOTS.values()] if slot else None
                messages.append({"role": "assistant", "content": event["Text"], "asks": asks})
                asked[slot] = len(replies)
            case "Wizard", "query":
                reveal(event, replies, asked)
    tasks = [can["Task"] for can in dialogue["Scenario"]["WizardCapabilities"]]
    yield {"session_id": f"star-{dialogue['DialogueID']}", "messages": messages,
           "goal": f"Find out what is needed for: {', '.join(tasks).replace('_', ' ')}",
           "success": False if "DuringDialogue" in dialogue["CompletionLevel"] else None}


def main():
    convert("star", read)


if __name__ == "__main__":
    cli(main)
